"""VQA accuracy: agreement with ten people who were asked the same question.

Source: arXiv:1505.00468 and the description at visualqa.org/evaluation.html.
"""

import re
from collections.abc import Sequence

from mllm_cl.metrics.pairs import Reference, mean, pairs

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# Those whose bare form is no word of its own: "its", "were", "well", "ill", "shell" stay.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how'd "
    "how's i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock "
    "shan't should've shouldn't somebody's someone's something's that'd that's there'd there're "
    "there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why's won't would've wouldn't "
    "y'all you'd you'll you're you've"
)
APOSTROPHES = {word.replace("'", ""): word for word in CONTRACTIONS.split()}


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Mean over samples of the agreement with its annotators, usually ten.

        score = 1/n sum_j min(|{i != j : answer = reference_i}| / 3, 1)

    Both sides are normalised by `standard`. With a single reference, where leaving one out leaves
    nobody, the score is whether the two are equal.
    """
    return mean([_agreement(answer, people) for answer, people in pairs(predictions, references)])


def standard(answer: str) -> str:
    """The answer as VQA compares it: in lower case, without articles, numbers to ten as digits,
    contractions with their apostrophe, no punctuation but apostrophes, colons and decimal points.
    """
    text = answer.lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    found = [DIGITS.get(word, word) for word in text.split()]
    return " ".join(APOSTROPHES.get(word, word) for word in found if word not in ARTICLES)


def _agreement(answer: str, people: list[str]) -> float:
    said = standard(answer)
    agree = [said == standard(each) for each in people]
    if len(people) == 1:
        return float(agree[0])
    return mean([min((sum(agree) - left_out) / 3, 1.0) for left_out in agree])
