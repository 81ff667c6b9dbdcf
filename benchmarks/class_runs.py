"""What the cache of features saves in whole runs: `python -m benchmarks.class_runs RECIPE`.

Each method runs all stages of the recipe as it is, and again with every image encoded whenever
somebody asks: in each epoch of training, for each statistic and for each test, as code without a
cache does. Both learn and answer the same. Then the most memory that either takes.

    python -m benchmarks.class_runs recipes/quickstart_cil.yaml --methods proof,aper
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks import timing
from mllm_cl import Recipe, run
from mllm_cl.features import FeatureCache
from mllm_cl.model.encoder import Encoder

WITHOUT = ", no cache"


@contextlib.contextmanager
def forgetful() -> Iterator[None]:
    """Every image is encoded whenever it is asked for."""

    def of(cache: FeatureCache, samples, name: str) -> torch.Tensor:
        with cache.model.encoder.showing(cache._parts):
            return cache._encoded(samples, name)

    with (
        mock.patch.object(Encoder, "steady", property(lambda _: False)),
        mock.patch.object(FeatureCache, "of", of),
        mock.patch.object(FeatureCache, "has", lambda *_: False),
    ):
        yield


def variant(path: str, name: str, words: list[str]) -> Callable[[], list[float]]:
    """A whole run in a folder of its own, and the accuracies that it told."""
    method = name.removesuffix(WITHOUT)

    def whole() -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--output_dir", folder, "--method.name", method]
            with forgetful() if name.endswith(WITHOUT) else contextlib.nullcontext():
                run(Recipe.load(path, [*words, *own]))
            rows = json.loads((Path(folder) / "scores.json").read_text())["rows"]
        return [score for row in rows for score in row["scores"].values()]

    return whole


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--methods", default="proof,aper")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", help="print the peak memory of one variant, in bytes")
    parser.add_argument("--json", help="append the rows to this file, one a line")
    arguments, words = parser.parse_known_args()  # the rest are the recipe's own --KEY VALUE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.peak:
        print(timing.most_allocated(variant(arguments.recipe, arguments.peak, words), device))
        return
    found = []
    for method in arguments.methods.split(","):
        names = [method, method + WITHOUT]
        chosen = {name: variant(arguments.recipe, name, words) for name in names}
        first, again = (one() for one in chosen.values())
        difference = max(abs(a - b) for a, b in zip(first, again, strict=True))
        context = timing.environment(device) | {"benchmark": "class_runs", "differ": difference}
        timings = timing.compare(chosen, rounds=arguments.rounds, warmup=0, device=device)
        found += timing.rows(timings, baseline=method, context=context)
        command = ["benchmarks.class_runs", arguments.recipe, *words]
        found += timing.peak_rows(command, names, context)
    print(timing.table("whole runs", found, ("variant", "median_ms", "ratio", "differ")))
    if arguments.json:
        timing.append(found, arguments.json)


if __name__ == "__main__":
    main()
