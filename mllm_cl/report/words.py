"""What a run comes to, in sentences."""

import math
from collections.abc import Sequence

from mllm_cl.metrics.scores import CONSTANT, ZERO_SHOT, matrix
from mllm_cl.report.interval import Interval, interval
from mllm_cl.report.runs import Group, Run
from mllm_cl.report.stages import seen

# what runs are compared by: the summary's names, and how they are said
NUMBERS = {
    "average": "at the end",
    "finetune": "when new",
    "forgetting": "forgotten",
    "retain_average": "known before",
}
# and those of classes that come in stages
OF_CLASSES = {
    "last": "A_B, at the end",
    "average_incremental": "Ā, over all stages",
    "performance_drop": "PD, first less last",
    "forgetting": "forgotten",
    "old": "old classes",
    "new": "new classes",
    "harmonic_mean": "harmonic mean",
}
# and of images and captions
OF_PAIRS = {
    "last_i2t_r1": "R_B@1, image to text",
    "last_t2i_r1": "R_B@1, text to image",
    "mean_i2t_r1": "R\N{COMBINING MACRON}@1, image to text",
    "mean_t2i_r1": "R\N{COMBINING MACRON}@1, text to image",
    "last_i2t_r10": "R_B@10, image to text",
    "last_t2i_r10": "R_B@10, text to image",
    "forgetting": "forgotten",
}
SPACE = "\N{NO-BREAK SPACE}"  # a number stays with its unit at the end of a line
_WORDS = ("no", "one", "two", "three", "four", "five", "six")
_WORDS += ("seven", "eight", "nine", "ten", "eleven", "twelve")


def numbers(groups: Sequence[Group]) -> dict[str, str]:
    """What these groups are compared by; where some learn no classes, by what all of them have."""
    if all(group.of_pairs for group in groups):
        return OF_PAIRS
    return OF_CLASSES if all(group.of_classes for group in groups) else NUMBERS


def main_number(groups: Sequence[Group]) -> str:
    """The number that decides which of these groups is best."""
    return next(iter(numbers(groups)))


def number(count: int) -> str:
    """Small numbers as words."""
    return _WORDS[count] if count < len(_WORDS) else str(count)


def share(value: float) -> str:
    """A score as a percentage, rounded as the tables round it."""
    return f"{100 * float(f'{value:.2f}'):.0f}{SPACE}%"


def told(groups: Sequence[Group]) -> str:
    """How much was learnt and how much was forgotten, in a sentence or three."""
    if all(group.of_classes for group in groups):
        return _classes_compared(groups) if len(groups) > 1 else _of_classes(groups[0])
    return _compared(groups) if len(groups) > 1 else _of_group(groups[0])


def _of_group(group: Group) -> str:
    learnt = max((_learnt(run) for run in group.runs), key=len)
    if not learnt:
        return "No task has been learnt yet: these are the scores of the incoming model."
    parts = [_learning(group, learnt), _not_learnt(group, learnt)]
    parts += [_forgetting(group, learnt), _retained(group), _to_come(group, learnt)]
    return " ".join(part for part in parts if part)


def _to_come(group: Group, learnt: Sequence[str]) -> str:
    if group.finished:
        return ""
    left = len(group.tasks) - len(learnt)
    are = "is" if left == 1 else "are"
    return f"{number(left).capitalize()} of {number(len(group.tasks))} {are} to come."


def _learnt(run: Run) -> list[str]:
    after = [row["after"] for row in run.scores["rows"]]
    tasks = run.scores["tasks"]
    last = after[-1] if after else ZERO_SHOT
    return [] if last == ZERO_SHOT else list(tasks[: tasks.index(last) + 1])


def _learning(group: Group, learnt: Sequence[str]) -> str:
    new, final = interval(group.summary("finetune")), interval(group.summary("average"))
    if final is None:
        return ""
    count = f"{number(len(learnt))} task{'s' if len(learnt) > 1 else ''}"
    if new is None:  # all at once, or nothing trained
        return f"The mean of {count} is {share(final.mean)} at the end."
    if len(learnt) == 1:
        return f"One task has been learnt: {share(final.mean)} on {learnt[0]}."
    return (
        f"{count.capitalize()} were learnt. Each scored {share(new.mean)} when it was new, on "
        f"average; at the end they score {share(final.mean)}."
    )


def _not_learnt(group: Group, learnt: Sequence[str]) -> str:
    """Which tasks scored no more when new than their most common answer does."""
    constant = group.runs[0].scores.get(CONSTANT, {})
    found = []
    for name in learnt:
        new = interval([value for run in group.runs for value in _when_new(run, name)])
        if new is not None and name in constant and new.mean <= constant[name] + 0.005:
            found.append(f"{name} ({share(constant[name])})")
    if not found:
        return ""
    verb = "scores" if len(found) == 1 else "score"
    said = f"{verb} no more than one constant answer does: nothing was learnt there."
    return f"{', '.join(found)} {said}"


def _when_new(run: Run, name: str) -> list[float]:
    found = [row["scores"].get(name) for row in run.scores["rows"] if row["after"] == name]
    return [value for value in found if value is not None]


def _forgetting(group: Group, learnt: Sequence[str]) -> str:
    lost = _losses(group, learnt)
    if not lost:
        return ""
    name, (new, final) = max(lost.items(), key=lambda item: item[1][0] - item[1][1])
    if new - final < 0.005:
        return "Nothing was forgotten."
    return f"Most was lost on {name}: from {share(new)} to {share(final)}."


def _losses(group: Group, learnt: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The score when new and at the end of each task but the last, the mean over seeds."""
    found: dict[str, tuple[float, float]] = {}
    for column, name in enumerate(learnt[:-1]):
        pairs = []
        for run in group.runs:
            rows = {row["after"]: row for row in run.scores["rows"]}
            if name in rows:
                new, final = matrix([rows[name], run.scores["rows"][-1]], learnt)
                pairs.append((new[column], final[column]))
        if pairs and not any(math.isnan(value) for pair in pairs for value in pair):
            new, final = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            found[name] = new, final
    return found


def _retained(group: Group) -> str:
    now, change = (
        interval(group.summary("retain_average")),
        interval(group.summary("retain_change")),
    )
    if now is None or change is None:
        return ""
    before = now.mean - change.mean
    if abs(change.mean) < 0.005:
        return f"What the model knew before stayed at {share(now.mean)}."
    verb = "fell" if change.mean < 0 else "rose"
    return f"What the model knew before {verb} from {share(before)} to {share(now.mean)}."


def _compared(groups: Sequence[Group]) -> str:
    """Who scores best and worst of those that learnt one task after another; the others apart."""
    finals = {group.label: interval(group.summary("average")) for group in groups}
    rivals = [group for group in groups if group.trains and group.summary("finetune")]
    if not rivals:
        return "None of these runs has learnt one task after another yet."
    ranked = sorted(rivals, key=lambda group: finals[group.label].mean, reverse=True)
    best, worst = ranked[0].label, ranked[-1].label
    if len(ranked) == 1:
        said = [f"{best} scores {_percent(finals[best])} on average at the end."]
    else:
        said = [
            f"Of {kinds(rivals)}, {best} scores best at the end: {_percent(finals[best])} on "
            f"average; {worst} worst: {_percent(finals[worst])}.",
            _forgetting_compared(rivals),
        ]
    for group in groups:
        if group not in rivals and finals[group.label] is not None:
            how = "all tasks at once" if group.trains else "no training"
            said.append(f"With {how} ({group.label}): {_percent(finals[group.label])}.")
    if len({tuple(group.tasks) for group in groups}) > 1:
        said.append("But they did not learn the same tasks.")
    return " ".join(part for part in (*said, _unfinished(groups)) if part)


def _unfinished(groups: Sequence[Group]) -> str:
    labels = [group.label for group in groups if not group.finished]
    return f"Unfinished: {', '.join(labels)}." if labels else ""


def _of_classes(group: Group) -> str:
    learnt = max((_learnt(run) for run in group.runs), key=len)
    last, mean = interval(group.summary("last")), interval(group.summary("average_incremental"))
    if last is None or mean is None:
        return "No class has been learnt yet."
    stages = f"{number(len(learnt))} stage{'s' if len(learnt) > 1 else ''}"
    said = f"Of the test images of all of them {_percent(last)} are recognised at the end"
    said += f", {_percent(mean)} on average over the stages"
    old, new = interval(group.summary("old")), interval(group.summary("new"))
    if old and new:
        said += f"; of old classes {share(old.mean)}, of the newest {share(new.mean)}"
    parts = [f"{seen(learnt[-1])} classes were learnt in {stages}.", f"{said}."]
    parts += [_forgetting(group, learnt), _to_come(group, learnt)]
    return " ".join(part for part in parts if part)


def _classes_compared(groups: Sequence[Group]) -> str:
    """Who recognises most and fewest, of those that have come to the end."""
    finals = {group.label: interval(group.summary("last")) for group in groups if group.finished}
    ranked = sorted(finals, key=lambda label: finals[label].mean, reverse=True)
    done = [group for group in groups if group.finished]
    said = []
    if ranked:
        best, worst = ranked[0], ranked[-1]
        said = [f"{best} recognises {_percent(finals[best])} of the test images of all classes"]
        said[0] += f", best of {kinds(done)}" if len(ranked) > 1 else ""
        said[0] += f"; {worst}, worst, {_percent(finals[worst])}." if len(ranked) > 1 else "."
        said.append(_forgetting_compared(done))
    if len({tuple(group.tasks) for group in groups}) > 1:
        said.append("But they did not learn the same stages.")
    return " ".join(part for part in (*said, _unfinished(groups)) if part)


def kinds(groups: Sequence[Group]) -> str:
    """How many methods are compared, or settings of how many."""
    methods = len({group.runs[0].method for group in groups})
    some = f"{number(methods)} method{'s' if methods > 1 else ''}"
    return some if methods == len(groups) else f"{number(len(groups))} settings of {some}"


def _forgetting_compared(groups: Sequence[Group]) -> str:
    """Who fell least and most below its best, among those that learnt one task after another."""
    found = {group.label: interval(group.summary("forgetting")) for group in groups}
    lost = {label: one.mean for label, one in found.items() if one is not None}
    if len(lost) < 2:
        return ""
    least, most = min(lost, key=lost.__getitem__), max(lost, key=lost.__getitem__)
    what = "Stages" if all(group.of_classes for group in groups) else "Tasks"
    return (
        f"{what} fell below their best score by {_points(lost[least])} with {least}, "
        f"by {_points(lost[most])} with {most}."
    )


def _points(value: float) -> str:
    count = max(0, round(100 * value))
    return f"{count} point{'' if count == 1 else 's'}"


def _percent(found: Interval) -> str:
    half = "" if math.isnan(found.half) else f"{SPACE}±{SPACE}{100 * found.half:.0f}"
    return f"{share(found.mean)}{half}"
