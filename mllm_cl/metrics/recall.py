"""How well images and their captions find one another, from the ranks at which they do."""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_cl.metrics.scores import ZERO_SHOT

RECALL = "recall"  # of a row: the numbers of `RECALLS` over all tasks so far
RECALL_BY_TASK = "recall_by_task"  # the same by the task of the query
AT = (1, 5, 10)
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in AT)


def recalls(images: Sequence[int], captions: Sequence[int]) -> dict[str, float]:
    """R@1, R@5 and R@10 of the ranks of images' best captions (i2t) and of captions' images (t2i):
    the share of the queries with at most that rank.
    """
    ways = {"i2t": images, "t2i": captions}
    return {
        f"{way}_r{k}": sum(rank <= k for rank in found) / len(found)
        for way, found in ways.items()
        for k in AT
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each recall the mean over the stages, `mean_i2t_r1` …, and that after the last stage,
    `last_i2t_r1` …: the R-bar@k and R_B@k of PROOF (arXiv:2305.19270).
    """
    found = [row[RECALL] for row in rows if row["after"] != ZERO_SHOT]
    if not found:
        return {}
    mean = {f"mean_{key}": sum(one[key] for one in found) / len(found) for key in RECALLS}
    return {f"last_{key}": found[-1][key] for key in RECALLS} | mean
