"""Which method runs where, as the tests hold it: `python tests/support.py > docs/support.md`."""

from engine_script import cases
from mllm_cl.method import Method, load_method, names
from mllm_cl.model.four_bit import ENGINES as PACKED

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# What tests/test_quantised.py learns with packed weights, and the method it launches on engines.
PACKED_LEARN, PACKED_LAUNCHED = ("finetune", "moe_lora", "expert_lora", "same"), "expert_lora"

HEAD = """# Which method runs where

Made by `python tests/support.py > docs/support.md`, and held to what the tests say.

* **compared**: a test trains it there, and compares what it finds with one process.
* yes: it runs there; its mathematics is tested in one process.
* no: refused in one sentence before the model loads.

These are the methods of instruction tuning. Of those for classes, `aper` is compared in whole runs
of one process, DDP, ZeRO-2 and FSDP2.

| method | weights | single | DDP | ZeRO-1 | ZeRO-2 | ZeRO-3 | FSDP2 |
|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The page."""
    compared = {(case.method, engine) for engine in ENGINES for case in cases(engine)}
    lines = []
    for name in names("instruction"):
        method = load_method(name)()
        lines.append((name, "as they are", method, compared, ENGINES))
        launched = {(PACKED_LAUNCHED, engine) for engine in ("single", "ddp", "zero2")}
        packed = launched | {(one, "single") for one in PACKED_LEARN}
        takes = () if trains_base(name) else PACKED
        lines.append((name, "four bits", method, packed, takes))
    return HEAD + "".join(_line(*line) for line in lines)


def trains_base(name: str) -> bool:
    """Whether no setting lets a method leave the base's weights alone."""
    kind = load_method(name)
    settings = {"experts": "lora"} if name == "esft" else {}
    return kind(**settings).trains_base


def _line(
    name: str, weights: str, method: Method, compared: set[tuple[str, str]], takes: tuple[str, ...]
) -> str:
    cells = [
        "no"
        if engine not in takes or engine not in method.runs_on
        else "**compared**"
        if (name, engine) in compared
        else "yes"
        for engine in ENGINES
    ]
    return f"| `{name}` | {weights} | " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    print(table(), end="")
