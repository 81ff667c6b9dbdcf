"""The metrics by name: each maps (predictions, references) to [0, 1], higher is better.

Every task is also scored by `exact_match` and `normalised_match`: what only the second forgives is
forgetting of the answer's form, not of its content (arXiv:2505.02486).
"""

import difflib
from importlib.util import find_spec

from mllm_cl.metrics.captions import bleu_4, cider_d, meteor_exact, rouge_l
from mllm_cl.metrics.matching import anls, exact_match, iou_50, multiple_choice, normalised_match
from mllm_cl.metrics.pairs import Metric
from mllm_cl.metrics.vqa import vqa_accuracy

METRICS: dict[str, Metric] = {
    each.__name__: each
    for each in (
        exact_match,
        normalised_match,
        multiple_choice,
        vqa_accuracy,
        anls,
        iou_50,
        bleu_4,
        rouge_l,
        meteor_exact,
        cider_d,
    )
}


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises ValueError for an unknown name, with the nearest, and for one whose package is missing.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown metric {name!r}; {hint}known are {', '.join(METRICS)}")
    if name == "bleu_4" and find_spec("sacrebleu") is None:
        raise ValueError(
            "the metric 'bleu_4' needs sacrebleu, which is not installed; "
            "run pip install 'mllm_cl[captions]'"
        )
    return METRICS[name]
