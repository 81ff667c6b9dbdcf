"""Every metric of answers, against examples worked by hand."""

import math
import subprocess
import sys

import pytest

from mllm_cl.metrics.answers import METRICS, metric
from mllm_cl.metrics.matching import (
    anls,
    distance,
    exact_match,
    iou_50,
    multiple_choice,
    normalised_match,
)
from mllm_cl.metrics.pairs import most_common
from mllm_cl.metrics.vqa import standard, vqa_accuracy


def score(name: str, answer: str, *right: str) -> float:
    """The score of one answer with these references."""
    return metric(name)([answer], [list(right)])


def test_exact_match_counts_equal_answers_and_nothing_else():
    assert exact_match(["red", "Red", "red."], ["red", "red", "red"]) == pytest.approx(1 / 3)


def test_normalised_match_forgives_case_spaces_and_the_final_stop():
    forgiven = {"Red": "red", " red ": "red", "red.": "red", "a  b!": "A b", "red ?": "red"}
    wrong = {"re.d": "red", "redd": "red", "rede": "red", "red,": "red", ".red": "red"}
    assert normalised_match(list(forgiven), list(forgiven.values())) == 1.0
    assert normalised_match(list(wrong), list(wrong.values())) == 0.0


def test_any_of_several_references_is_right():
    for name in ("exact_match", "normalised_match", "multiple_choice", "anls"):
        assert score(name, "crimson", "red", "crimson") == 1.0
        assert score(name, "blue", "red", "crimson") == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_one_for_the_references_themselves_and_never_more(name):
    texts = ["[1, 1, 9, 9] on the left side of a", "[2, 2, 8, 8] dogs run over green grass"]
    # METEOR counts one run of n words as a break of their order, 0.5 / n^3.
    assert metric(name)(texts, texts) == pytest.approx(1.0, abs=1e-3 * (name == "meteor_exact"))
    assert metric(name)(texts, [[each, texts[0]] for each in texts]) <= 1.0
    assert metric(name)(["", "nothing"], texts) == 0.0


@pytest.mark.parametrize("pair", [([], []), (["a"], []), (["a"], ["a", "b"]), (["a"], [[]])])
@pytest.mark.parametrize("name", METRICS)
def test_scores_of_nothing_or_of_unequal_lists_are_refused(name, pair):
    with pytest.raises(ValueError, match="expected"):
        metric(name)(*pair)


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'exact_match'"):
        metric("exact_mach")


def test_a_metric_without_its_package_is_refused_with_the_command_that_installs_it():
    code = (
        "import sys; sys.modules['sacrebleu'] = None\n"
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "from mllm_cl.metrics.answers import metric\n"
        "metric('cider_d')\n"
        "metric('bleu_4')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'mllm_cl[captions]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B.", "B. a cat", "(B) a dog", "**B**", "B: a cat", "[B]", "It is (B)."]
    + ["The answer is B", "answer: B", "Option B.", "The answer is (B) since", "A cat.", "a cat"],
)
def test_a_choice_is_read_from_its_letter_or_its_text(answer):
    assert score("multiple_choice", answer, "B. a cat") == 1.0
    assert score("multiple_choice", answer, "B", "a cat") == 1.0


@pytest.mark.parametrize(
    "answer",
    ["A", "A. a cat", "The answer is A", "a dog", "(A) or (B)", "Because", "", "Bats", "A B"]
    + ["The answer is a dog", "answers B"],
)
def test_another_letter_two_letters_or_a_word_are_no_choice(answer):
    assert score("multiple_choice", answer, "B. a cat") == 0.0


def test_a_choice_may_have_no_letters_at_all():
    assert multiple_choice(["U.S. dollars", "B. euros"], ["U.S. dollars", "euros"]) == 1.0
    assert score("multiple_choice", "U.S. troops", "S. U.S. troops") == 1.0


def test_vqa_accuracy_leaves_each_annotator_out_in_turn():
    # Two of ten agree: leaving out one of the two, one is left, 1/3; leaving out another, 2/3.
    assert score("vqa_accuracy", "red", *["red"] * 2, *["blue"] * 8) == pytest.approx(
        (2 * 1 / 3 + 8 * 2 / 3) / 10
    )
    # Three agree: 3 times 2/3, 7 times 1. Four agree: at least three are always left.
    assert score("vqa_accuracy", "red", *["red"] * 3, *["blue"] * 7) == pytest.approx(0.9)
    assert score("vqa_accuracy", "red", *["red"] * 4, *["blue"] * 6) == 1.0
    assert vqa_accuracy(["red", "x"], [["red"] * 10, ["red"] * 10]) == 0.5
    assert score("vqa_accuracy", "The Red", "red") == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("its theirs, well", "its theirs well"),
        ("girl's", "girl's"),
        ("2:50 pm.", "2:50 pm"),
        ("3.5 m.", "3.5 m"),
        ("100,978", "100978"),
        ("red/blue, and a (big) one!", "red blue and big 1"),
        ("an   apple", "apple"),
    ],
)
def test_vqa_normalises_as_it_is_published(answer, expected):
    assert standard(answer) == expected


def test_edit_distance_of_known_pairs():
    known = {("kitten", "sitting"): 3, ("", "abc"): 3, ("abc", ""): 3, ("flaw", "lawn"): 2}
    assert all(distance(*pair) == steps for pair, steps in known.items())


def test_anls_forgives_a_misread_letter_and_not_half_the_word():
    assert anls(["Hello  Worle"], ["hello world"]) == pytest.approx(10 / 11)
    assert score("anls", "abcd", "abxy") == 0.0  # 1 - 2/4 is not above the threshold
    assert score("anls", "abcde", "abcxy") == pytest.approx(0.6)
    assert score("anls", "abc", "xyz", "abd") == pytest.approx(2 / 3)


def test_boxes_are_compared_by_intersection_over_union():
    right = "[0, 0, 10, 10]"
    assert score("iou_50", "(0,0),(10,5)", right) == 1.0  # 50 / 100
    assert score("iou_50", "[0, 0, 10, 4.9]", right) == 0.0
    assert score("iou_50", "[5, 5, 15, 15]", right) == 0.0  # 25 / 175
    assert score("iou_50", '{"bbox_2d": [0.0, -0.5, 10, 10.]}', right) == 1.0
    assert score("iou_50", "[20, 20, 30, 30]", right, "<21><21><30><30>") == 1.0
    for nothing in ("", "a cat", "1, 2, 3", "[10, 10, 0, 0]", "[0, 0, 0, 10]"):
        assert iou_50([nothing], [right]) == 0.0
    with pytest.raises(ValueError, match="holds no box"):
        iou_50([right], ["on the left"])


def test_bleu_is_the_geometric_mean_of_four_precisions_with_a_brevity_penalty():
    # All but the last word, and the n-grams that end in it, are in the reference of 8 words.
    answer, right = "the cat sat on the mat today", "the cat sat on the mat all day"
    precisions = [6 / 7, 5 / 6, 4 / 5, 3 / 4]
    expected = math.prod(precisions) ** 0.25 * math.exp(1 - 8 / 7)
    assert score("bleu_4", answer, right) == pytest.approx(expected, abs=1e-6)
    assert score("bleu_4", answer.upper(), "x", right) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_weighs_the_common_subsequence_towards_recall():
    # "a b d" is common: 3 of the answer's 4 words, 3 of the reference's 5
    p, r, b = 3 / 4, 3 / 5, 1.2
    expected = (1 + b * b) * p * r / (r + b * b * p)
    assert score("rouge_l", "a b x d", "a b c d e") == pytest.approx(expected)
    # The best precision and the best recall may come from different references.
    p, r = 3 / 4, 2 / 2
    expected = (1 + b * b) * p * r / (r + b * b * p)
    assert score("rouge_l", "a b x d", "a b c d e", "a d") == pytest.approx(expected)


def test_meteor_counts_words_and_how_often_their_order_breaks():
    # All 6 words match, in the runs "the cat", "on the mat" and "sat".
    assert score("meteor_exact", "on the mat sat the cat", "the cat sat on the mat") == (
        pytest.approx(1 - 0.5 * (3 / 6) ** 3)
    )
    p, r = 2 / 3, 2 / 4
    expected = 10 * p * r / (r + 9 * p) * (1 - 0.5 * (1 / 2) ** 3)
    assert score("meteor_exact", "red car here", "a red car drives") == pytest.approx(expected)


def test_cider_weighs_words_by_how_few_samples_have_them():
    # "a" is in both samples' references and weighs nothing: only "cat" and "dog" count.
    assert metric("cider_d")(["a", "a"], ["a cat", "a dog"]) == 0.0
    # Unigrams: cosine 1 for "cat" against "a cat", one word shorter; no pair of words in common.
    expected = (math.exp(-1 / 72) + 0.0) / 2 / 4
    assert metric("cider_d")(["cat", "bird"], ["a cat", "a dog"]) == pytest.approx(expected)


def test_cider_is_clipped_and_averaged_over_references():
    # "cat cat" has twice the weight of "cat", of which the reference's count 1 is taken:
    # min(2, 1) * 1 / (2 * 1) = 1/2 for words, nothing for pairs of words.
    repeated = metric("cider_d")(["cat cat", "x"], ["cat", "dog"])
    assert repeated == pytest.approx(0.5 * math.exp(-1 / 72) / 2 / 4)
    one_of_two = metric("cider_d")(["cat", "x"], [["cat", "bird"], "dog"])
    assert one_of_two == pytest.approx(0.5 / 2 / 4)


def test_cider_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="found 1 sample"):
        metric("cider_d")(["a cat"], ["a cat"])


def test_the_most_common_answer_counts_a_sample_once_and_the_first_of_those_that_tie():
    assert most_common(["yes", "no", "no"]) == "no"
    assert most_common([["2", "two", "2", "2"], ["3"], ["3", "two"]]) == "two"
