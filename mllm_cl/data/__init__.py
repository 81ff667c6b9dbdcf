"""Samples and batches: the toy tasks drawn offline, data sets of one's own, and the collator for
both.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mllm_cl.task import Sample


def read(data: str, split: str, size: int | None, seed: int, **args: str) -> Sequence[Sample]:
    """The samples of `toy:NAME`, or of a folder or hub data set with columns `messages` and
    `images`.

    `size` takes the first samples of the split, None all; toy tasks have 2000 to train and 200 to
    test.
    """
    if data.startswith("toy:"):
        from mllm_cl.data.toy import toy_task

        if args:
            raise ValueError(f"toy tasks take no args, found {', '.join(args)}")
        number = size or (2000 if split == "train" else 200)
        return toy_task(data.removeprefix("toy:"), split, number, seed)
    from datasets import load_dataset

    if Path(data).expanduser().is_file():
        raise ValueError(f"{data} is a file; give a folder that holds a train and a test file")
    rows = load_dataset(str(Path(data).expanduser()), split=split, **args)
    missing = {"messages", "images"} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{data} lacks the columns {', '.join(sorted(missing))}; it has "
            f"{', '.join(rows.column_names)}"
        )
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{index}" for index in range(len(rows))])
    return rows if size is None else rows.select(range(min(size, len(rows))))


def fingerprint(samples: Sequence[Sample], probes: int = 64) -> str:
    """16 hex digits of the length and of `probes` samples spread over the set, texts and pixels."""
    digest = hashlib.sha256(str(len(samples)).encode())
    for index in sorted(
        {round(k * (len(samples) - 1) / max(probes - 1, 1)) for k in range(probes)}
    ):
        sample = samples[index]
        digest.update(json.dumps([str(sample["id"]), sample["messages"]]).encode())
        for image in sample["images"] or ():
            digest.update(image.tobytes())
    return digest.hexdigest()[:16]
