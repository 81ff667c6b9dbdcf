"""Samples and batches: the toy tasks drawn offline, data sets of one's own, and the collator for
both.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mllm_cl.data.errors import DataError
from mllm_cl.task import Sample


def read(data: str, split: str, size: int | None, seed: int, **args: object) -> Sequence[Sample]:
    """The samples of `toy:NAME`, or of a file, a folder or a data set of the hub.

    `size` takes the first samples of the split, None all; toy tasks have 2000 to train and 200 to
    test, and one of the `args`, `shift`; for all else they are `mllm_cl.data.source.reading`'s.
    `${NAME}/vl` begins with what the environment says, `${NAME:-PLACE}/vl` with PLACE without it.
    Raises DataError, a ValueError, for what cannot be read; a row that cannot be used raises it
    when it is asked for.
    """
    if data.startswith("toy:"):
        from mllm_cl.data.toy import toy_task

        shift = args.pop("shift", 0)
        if args or type(shift) is not int:
            found = ", ".join(args) or f"shift {shift!r}"
            raise DataError(f"toy tasks take one arg, 'shift: NUMBER'; found {found}")
        number = size or (2000 if split == "train" else 200)
        return toy_task(data.removeprefix("toy:"), split, number, seed, shift=shift)
    from mllm_cl.data.source import open_samples
    from mllm_cl.data.source.reading import Reading

    return open_samples(filled(data), split, size, Reading.of(args))


def filled(data: str) -> str:
    """The path with `${NAME}` and `${NAME:-PLACE}` replaced, as a shell does.

    Raises DataError where nothing is at a place that was filled in.
    """

    def value(found: re.Match) -> str:
        name, place = found["name"], found["place"]
        text = os.environ.get(name) or place
        if text is None:
            raise DataError(f"the environment has no {name}; set it to a folder", data)
        return text

    place = re.sub(r"\$\{(?P<name>\w+)(:-(?P<place>[^}]*))?\}", value, data)
    if place != data and not Path(place).expanduser().exists():
        problem = f"no such file or folder. The recipe has {data}: set that variable to its place"
        raise DataError(problem, place)
    return place


def fingerprint(samples: Sequence[Sample], probes: int = 64) -> str:
    """16 hex digits of the length and of `probes` samples spread over the set, words and pixels."""
    digest = hashlib.sha256(str(len(samples)).encode())
    for index in sorted(
        {round(k * (len(samples) - 1) / max(probes - 1, 1)) for k in range(probes)}
    ):
        sample = samples[index]
        digest.update(json.dumps([str(sample["id"]), _said(sample)]).encode())
        for image in sample["images"] or ():
            digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _said(sample: Sample) -> object:
    """What belongs to the pictures of a sample: a conversation, a class's name, or captions."""
    return next(sample[key] for key in ("messages", "label", "captions") if key in sample)
