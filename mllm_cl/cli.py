"""The command line: it parses, calls and prints; what it calls is imported only when it is called.

    mllm-cl run recipes/quickstart.yaml --method.damping 0.3
    accelerate launch --config_file launch/zero3.yaml -m mllm_cl run recipes/quickstart.yaml

Exit codes: 0 done, 1 failed, 2 bad recipe or input, 3 stopped by SIGTERM (run it again to go on),
130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial

from mllm_cl import __version__

RUN_USAGE = """mllm-cl run RECIPE [--KEY VALUE ...] [--sweep KEY=A,B KEY=C,D [--cell N]]
       mllm-cl run RECIPE [--KEY VALUE ...] --dry-run [--launch FILE]"""
ONE_RATE = """every method of this sweep trains at the learning rate and weight decay of the recipe,
which suit the method it was written for; a fair table gives each its own (README, Many runs)"""
RUN_NOTES = """--sweep runs every combination in a folder of its own, --cell only the N-th (from
0), for job arrays; --dry-run says what would train and what it would take, under a launch file of
accelerate, and loads no weights."""
RUN_HELP = """any key of the recipe: --seed 1, --method.damping=0.3, --tasks.0.train_size 100;
values are YAML, and the recipe comes first; with another --method.name, what that method does not
take of the file's settings is left out, and named"""

EXPORT_NOTES = """merged: the model with everything in its weights, for plain transformers; peft: an
adapter for plain PEFT; per-expert-peft: one with factors for every expert, as servers read it. The
card in the folder says how far its logits are from the trained model's."""

CLASSIFY_NOTES = """A line for each picture: its path, then names and what the head answers for
each, the best first, with tabs between them. What the numbers are is the method's: cosines,
distances or logits."""

DESCRIBE_NOTES = """The endpoint is what ends in /v1; its key is read from an environment variable.
Without one the model is a folder or a name on the hub, and runs here. Every answer is kept as it
comes: the same command goes on where it was stopped, and asks for no more than what is missing."""

# What libraries say when they are imported where there is no GPU, by logger.
KNOWN_ADVICE = {
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what is unforeseen is left to Python (1)."""
    arguments = _parser().parse_args(words)
    for name, advice in KNOWN_ADVICE.items():
        logging.getLogger(name).addFilter(partial(_is_not, advice))
    from mllm_cl.data.errors import DataError
    from mllm_cl.recipe import RecipeError
    from mllm_cl.stopping import Failed

    try:
        return arguments.call(arguments)
    except RecipeError as error:
        _tell(str(error))
        return 2
    except DataError as error:
        _tell_from_anywhere(str(error))
        return 2
    except Failed as error:
        tell = _tell if error.everywhere else _tell_from_anywhere
        tell(str(error))
        return 1
    except FloatingPointError as error:
        _tell_from_anywhere(str(error))
        return 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _is_not(advice: str, record: logging.LogRecord) -> bool:
    return advice not in str(record.msg)  # an exception may be logged as it is


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mllm-cl", description="Continual fine-tuning of multimodal LLMs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mllm-cl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train and score the tasks of a recipe",
        usage=RUN_USAGE,
        epilog=RUN_NOTES,
        allow_abbrev=False,
    )
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    run.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help=RUN_HELP)
    run.set_defaults(call=_run)

    known = commands.add_parser(
        "measure", help="what a model already knows, as a memory that a recipe starts from"
    )
    known.add_argument("model", metavar="MODEL", help="a folder or a name on the hub")
    known.add_argument("adapter", metavar="ADAPTER", nargs="?", help="a PEFT adapter's folder")
    known.add_argument(
        "--data", action="append", required=True, help="what it answers; again for more"
    )
    known.add_argument(
        "--to", required=True, metavar="FILE", help="the memory, a .safetensors file"
    )
    known.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the recipe that will start from it: method.rank=128; again for more",
    )
    known.set_defaults(call=_measure)

    data = commands.add_parser(
        "data", help="look at the data of a recipe before a run", allow_abbrev=False
    )
    data.add_argument("what", choices=("check",))
    data.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    data.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help=RUN_HELP)
    data.set_defaults(call=_data)

    health = commands.add_parser(
        "doctor",
        help="say what is installed, what runs here, and what does not go together",
        allow_abbrev=False,
    )
    health.add_argument("recipe", metavar="RECIPE", nargs="?", help="open its model and data too")
    health.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help=RUN_HELP)
    health.set_defaults(call=_doctor)

    names = commands.add_parser("list", help="name what there is")
    names.add_argument("what", choices=("methods", "tasks"))
    names.set_defaults(call=_list)

    report = commands.add_parser("report", help="show runs: a table here, a page and pictures")
    report.add_argument(
        "runs", metavar="RUN", nargs="+", help="output folders of runs, or of sweeps"
    )
    report.add_argument(
        "--output", metavar="FOLDER", help="where they go; default: RUN/report, of several ./report"
    )
    report.set_defaults(call=_report)

    said = commands.add_parser(
        "describe",
        help="have a language model say what the classes of a recipe look like",
        epilog=DESCRIBE_NOTES,
        allow_abbrev=False,
    )
    said.add_argument("recipe", metavar="RECIPE", help="a YAML file with classes")
    said.add_argument("--model", metavar="NAME", required=True, help="the language model")
    said.add_argument("--endpoint", metavar="URL", help="a server of OpenAI's chat completions")
    said.add_argument("--output", metavar="FILE", help="default: the recipe's classes.descriptions")
    said.add_argument(
        "--key-variable", metavar="NAME", default="OPENAI_API_KEY", help="default: %(default)s"
    )
    said.add_argument("--at-once", metavar="N", type=int, default=4, help="questions; default: 4")
    said.set_defaults(call=_describe)

    other = commands.add_parser("import", help="make a recipe of a PILOT or C3Box JSON config")
    other.add_argument("config", metavar="CONFIG.json")
    other.add_argument(
        "--output", metavar="FILE", help="the recipe; default: the config's name with .yaml, here"
    )
    other.set_defaults(call=_import)

    asked = commands.add_parser(
        "classify",
        help="name the classes of pictures by what a run has learnt",
        epilog=CLASSIFY_NOTES,
        allow_abbrev=False,
    )
    asked.add_argument("run", metavar="RUN", help="the output folder of a run of classes")
    asked.add_argument("pictures", metavar="PICTURE", nargs="+", help="a file, or a folder of them")
    asked.add_argument("--task", metavar="T", help="after which stage; default: the newest")
    asked.add_argument("--top", metavar="K", type=int, default=1, help="names; default: 1")
    asked.add_argument("--trust-remote-code", action="store_true", help="run the base's own code")
    asked.set_defaults(call=_classify)

    out = commands.add_parser(
        "export",
        help="write what a run has learnt as a folder that others open",
        epilog=EXPORT_NOTES,
        allow_abbrev=False,
    )
    out.add_argument("run", metavar="RUN", help="the output folder of a run")
    out.add_argument("--task", metavar="T", help="after which task; default: the newest complete")
    out.add_argument("--to", required=True, choices=("merged", "peft", "per-expert-peft"))
    out.add_argument("--output", metavar="DIR", help="default: RUN/export/TASK-FORM")
    out.add_argument("--push-to-hub", action="store_true", help="upload the folder too")
    out.add_argument("--hub-model-id", metavar="ID", help="where to; default: the recipe's")
    out.add_argument("--hub-private-repo", action="store_true", default=None)
    out.add_argument("--trust-remote-code", action="store_true", help="run the base's own code")
    out.set_defaults(call=_export)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from mllm_cl.stopping import Stopped, Stopping

    try:
        with Stopping() as stopping:  # from the first moment: what follows takes seconds to import
            return _do(arguments, stopping)
    except Stopped:
        _tell("stopped as asked; the same command goes on where this one was")
        return 3


def _do(arguments: argparse.Namespace, stopping) -> int:
    from mllm_cl.recipe import Recipe, RecipeError
    from mllm_cl.sweep import cells, chosen, split_sweep

    words, axes = split_sweep(arguments.overrides)
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    words, launch = _taken(words, "--launch")
    words, cell = _taken(words, "--cell")
    for name, value, needed in (("launch", launch, dry), ("cell", cell, bool(axes))):
        if value is not None and not needed:
            raise RecipeError(name, f"goes with --{'dry-run' if name == 'launch' else 'sweep'}")
    if axes:
        if "method.name" in axes and "training.learning_rate" not in axes:
            _tell(ONE_RATE)
        found = chosen(cells(arguments.recipe, words, axes), cell)
        recipes = [one.recipe for one in found]
    else:
        recipes = [Recipe.load(arguments.recipe, words)]
    return _forecast(recipes, launch) if dry else _train(recipes, stopping)


def _forecast(recipes: list, launch: str | None) -> int:
    """Say what each recipe would take; trains nothing."""
    from mllm_cl.forecast import Launch, forecast, tell
    from mllm_cl.forecast_classes import forecast_classes, tell_classes

    engines = Launch.read(launch) if launch else Launch()
    for recipe in recipes:
        _announce(recipe, recipes)
        if recipe.of_images:
            tell_classes(forecast_classes(recipe, engines))
        else:
            tell(forecast(recipe, engines))
    return 0


def _announce(recipe, recipes: list) -> None:
    for note in recipe.notes:
        _tell(note)
    if len(recipes) > 1:
        _tell(f"{recipes.index(recipe) + 1}/{len(recipes)} {recipe.output_dir}")


def _taken(words: list[str], name: str) -> tuple[list[str], str | None]:
    """Words without the option `name`, and its value."""
    for index, word in enumerate(words):
        head, equals, value = word.partition("=")
        if head == name and equals:
            return words[:index] + words[index + 1 :], value
        if head == name and index + 1 < len(words):
            return words[:index] + words[index + 2 :], words[index + 1]
    return words, None


def _train(recipes: list, stopping) -> int:
    """Run recipes in turn; what is done is not done again."""
    from mllm_cl.runner import run

    for recipe in recipes:
        _announce(recipe, recipes)
        run(recipe, stopping)
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from mllm_cl.recipe import Recipe

    model = {"model_name_or_path": arguments.model}
    if arguments.adapter is not None:
        model["adapter_name_or_path"] = arguments.adapter
    known = [{"name": f"known{n}", "data": data} for n, data in enumerate(arguments.data)]
    tree = {
        "model": model,
        "method": {"name": "same"},
        "retain": known,
        "tasks": [{"name": "none", "data": arguments.data[0]}],
    }
    settings = [f"--{setting}" for setting in arguments.set]
    recipe = Recipe.from_tree(tree, "mllm-cl measure", settings)
    from mllm_cl.runner import measure

    measure(recipe, Path(arguments.to))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from mllm_cl.recipe import Recipe

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    if recipe.classes is not None:
        from mllm_cl.data.check_classes import check_classes

        return check_classes(recipe)
    if recipe.retrieval is not None:
        from mllm_cl.data.check_captions import check_captions

        return check_captions(recipe)
    from mllm_cl.data.check import check
    from mllm_cl.settings.instruction import processor_of

    return check(recipe, processor_of(recipe))


def _doctor(arguments: argparse.Namespace) -> int:
    from mllm_cl.doctor import doctor
    from mllm_cl.recipe import Recipe

    named = arguments.recipe is not None
    return doctor(Recipe.load(arguments.recipe, arguments.overrides) if named else None)


def _list(arguments: argparse.Namespace) -> int:
    if arguments.what == "tasks":
        from mllm_cl.data.toy import BASE_SKILLS, TOY_TASKS
        from mllm_cl.data.toy_classes import SETS

        for name in (*BASE_SKILLS, *TOY_TASKS):
            print(f"toy:{name}")
        for name in SETS:
            print(f"toy:{name:24}pictures with classes")
        print(f"toy:{'compositions':24}pictures with captions")
        return 0
    import ast

    from mllm_cl.method import SETTINGS, names

    for name, path in (pair for setting in SETTINGS for pair in names(setting).items()):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(text.split("\n\n")[0].split())
        print(f"{name:24}{path.parent.name:20}{first}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from mllm_cl.report import compare, read, show, write

    try:
        groups = read(arguments.runs)
    except ValueError as error:
        _tell(str(error))
        return 2
    if sum(len(group.runs) for group in groups) == 1:
        show(groups[0].runs[0].scores)
    else:
        compare(groups)
    home = arguments.runs[0] if len(arguments.runs) == 1 else "."
    path = write(groups, arguments.output or os.path.join(home, "report"))
    print(f"report: {path}")
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    from mllm_cl import describe
    from mllm_cl.answering import Endpoint, Local
    from mllm_cl.recipe import RecipeError

    if arguments.at_once < 1:
        raise RecipeError("--at-once", f"found {arguments.at_once}, expected 1 or more")
    recipe, named, words = describe.recipe_words(arguments.recipe)
    output = describe.output_file(arguments.recipe, named, arguments.output)
    try:
        if arguments.endpoint is None:
            ask, at_once = Local(arguments.model), 1
        else:
            key = os.environ.get(arguments.key_variable, "")
            ask, at_once = Endpoint(arguments.endpoint, arguments.model, key), arguments.at_once
    except ValueError as error:
        raise RecipeError("--endpoint" if arguments.endpoint else "--model", str(error)) from None
    found = describe.describe(words, ask, output, describe.parts_of(recipe), at_once)
    print(f"{len(found.classes)} classes, {sum(map(len, found.pairs.values()))} comparisons")
    print(f"descriptions: {output}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from mllm_cl.pilot import imported
    from mllm_cl.recipe import RecipeError

    output = Path(arguments.output or f"{Path(arguments.config).stem}.yaml")
    if output.exists():
        raise RecipeError("--output", f"{output} is there already; name another file")
    found = imported(arguments.config)
    output.write_text(found.text(arguments.config), encoding="utf-8")
    for key, why in found.unmapped.items():
        print(f"not in the recipe: {key}: {why}")
    print(f"recipe: {output}")
    return 0


def _classify(arguments: argparse.Namespace) -> int:

    from mllm_cl.classify import AT_ONCE, classifier, pictures
    from mllm_cl.data.source.images import open_picture
    from mllm_cl.recipe import RecipeError

    if arguments.top < 1:
        raise RecipeError("--top", f"found {arguments.top}, expected 1 or more")
    paths = pictures(arguments.pictures)
    asked = classifier(arguments.run, arguments.task, trust_remote_code=arguments.trust_remote_code)
    for start in range(0, len(paths), AT_ONCE):
        some = paths[start : start + AT_ONCE]
        logits_BC = asked.logits([open_picture(path.name, path.parent) for path in some])
        best = logits_BC.topk(min(arguments.top, len(asked.names)), dim=1)
        for path, *row in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            told = [f"{asked.names[place]}\t{value:.4f}" for value, place in zip(*row, strict=True)]
            print(path, *told, sep="\t", flush=True)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from mllm_cl.hub import Hub
    from mllm_cl.recipe import RecipeError

    for name in ("hub_model_id", "hub_private_repo"):
        if vars(arguments)[name] is not None and not arguments.push_to_hub:
            raise RecipeError(f"--{name.replace('_', '-')}", "goes with --push-to-hub")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("export", "found a launch of several processes, expected one alone")
    from mllm_cl.export import export

    hub = Hub(arguments.hub_model_id, arguments.hub_private_repo)
    export(
        Path(arguments.run),
        arguments.to,
        task=arguments.task,
        output=Path(arguments.output) if arguments.output else None,
        hub=hub if arguments.push_to_hub else None,
        trust_remote_code=arguments.trust_remote_code,
    )
    return 0


def _tell_from_anywhere(text: str) -> None:
    # what only one process has read or computed is known to that one alone
    from mllm_cl.stopping import process

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    who = "" if alone else f"{process()}: "
    print(f"mllm-cl: {who}{text}", file=sys.stderr)


def _tell(text: str) -> None:
    # all processes of a node have the same to say; one of them does
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mllm-cl: {text}", file=sys.stderr)
