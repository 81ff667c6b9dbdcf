"""The command line: it parses, calls and prints; what it calls is imported only when it is called.

    mllm-cl run recipes/quickstart.yaml --method.damping 0.3
    accelerate launch --config_file launch/zero3.yaml -m mllm_cl run recipes/quickstart.yaml

Exit codes: 0 done, 1 failed, 2 bad recipe or input, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from mllm_cl import __version__

RUN_HELP = """any key of the recipe: --seed 1, --method.damping=0.3, --tasks.0.train_size 100;
values are YAML, and the recipe comes first"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what is unforeseen is left to Python (1)."""
    arguments = _parser().parse_args(words)
    from mllm_cl.recipe import RecipeError

    try:
        return arguments.call(arguments)
    except RecipeError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mllm-cl", description="Continual fine-tuning of multimodal LLMs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mllm-cl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="train and score the tasks of a recipe", allow_abbrev=False
    )
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    run.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help=RUN_HELP)
    run.set_defaults(call=_run)

    names = commands.add_parser("list", help="name what there is")
    names.add_argument("what", choices=("methods", "tasks"))
    names.set_defaults(call=_list)

    report = commands.add_parser("report", help="show the score matrix of a run")
    report.add_argument("run", metavar="RUN", help="the output folder of a run")
    report.add_argument(
        "--png", metavar="FILE", help="where the figure goes; default: RUN/scores.png"
    )
    report.set_defaults(call=_report)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from mllm_cl.recipe import Recipe

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    from mllm_cl.runner import run

    run(recipe)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    if arguments.what == "tasks":
        from mllm_cl.data.toy import BASE_SKILLS, TOY_TASKS

        for name in (*BASE_SKILLS, *TOY_TASKS):
            print(f"toy:{name}")
        return 0
    import ast

    from mllm_cl.method import names

    for name, path in names().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"{name:24}{path.parent.name:20}{text.split(chr(10))[0]}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from mllm_cl.report import draw, load_scores, show

    try:
        scores = load_scores(arguments.run)
    except ValueError as error:
        _complain(str(error))
        return 2
    show(scores)
    path = arguments.png or os.path.join(arguments.run, "scores.png")
    draw(scores, path)
    print(f"figure: {path}")
    return 0


def _complain(text: str) -> None:
    # all processes of a node meet the same error; one of them tells it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mllm-cl: {text}", file=sys.stderr)
