"""Metrics of captions, each against all references of a sample: BLEU-4, ROUGE-L, METEOR without
synonyms, and CIDEr-D.

All are in [0, 1]. Words are lower case and without punctuation, where the COCO server uses a Java
tokenizer: compare numbers of one tool with each other, not with a paper's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise

from mllm_cl.metrics.pairs import Reference, mean, pairs, words


def bleu_4(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Corpus BLEU with n-grams to 4 words, by sacrebleu in lower case, divided by 100.

        exp(1/4 sum_n log p_n) * min(1, exp(1 - r / c)),  r, c: words of the references, predictions

    sacrebleu's own tokenizer and smoothing apply. Source: Papineni et al., ACL 2002.
    """
    from sacrebleu.metrics import BLEU

    found = pairs(predictions, references)
    most = max(len(right) for _, right in found)
    columns = [
        [right[index] if index < len(right) else None for _, right in found]
        for index in range(most)
    ]
    scorer = BLEU(lowercase=True, force=True)  # force: captions without full stops are no mistake
    # A perfect score is 100.00000000000004 there.
    return min(scorer.corpus_score([answer for answer, _ in found], columns).score / 100, 1.0)


def rouge_l(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """The longest common subsequence of words, as an F measure that favours recall.

        P = max_r LCS / |a|,  R = max_r LCS / |r|,  F = (1 + b^2) P R / (R + b^2 P),  b = 1.2

    Source: Lin, ACL workshop 2004, with the b of the COCO caption server, arXiv:1504.00325.
    """
    return mean([_rouge(words(a), list(map(words, b))) for a, b in pairs(predictions, references)])


def meteor_exact(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """METEOR of equal words only: no stems, no synonyms, which need WordNet; lower than METEOR.

        F = 10 P R / (R + 9 P),  score = F (1 - 0.5 (chunks / matches)^3); the best reference counts

    Chunks are runs of words that match in the same order, the longest taken first. Source: Banerjee
    and Lavie, ACL workshop 2005.
    """
    return mean(
        [
            max(_meteor(words(a), words(each)) for each in b)
            for a, b in pairs(predictions, references)
        ]
    )


def cider_d(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """CIDEr-D: how much of what is telling in the references, by tf-idf, the caption has.

        1/4 sum_n 1/m sum_j exp(-(|a| - |r_j|)^2 / 72) cos_n(a, r_j)
        cos_n = min(g(a), g(r_j)) . g(r_j) / (|g(a)| |g(r_j)|)

    g is the count of each n-gram times log(samples / samples whose references have it). Published
    numbers are this times 10, of stemmed words. Raises ValueError for one sample, where every
    n-gram has weight 0. Source: arXiv:1411.5726, eq. 3 to 5.
    """
    found = [(words(a), list(map(words, b))) for a, b in pairs(predictions, references)]
    if len(found) < 2:
        raise ValueError("found 1 sample, but cider_d weighs words by how many samples have them")
    return mean([mean(_cider(found, n)) for n in range(1, 5)])


def _rouge(answer: list[str], right: list[list[str]]) -> float:
    common = [_common(answer, each) for each in right]
    if not max(common):
        return 0.0
    precision = max(common) / len(answer)
    recall = max(length / len(each) for length, each in zip(common, right, strict=True) if each)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for (diagonal, up), y in zip(pairwise(above), b, strict=True):
            row.append(diagonal + 1 if x == y else max(up, row[-1]))
    return row[-1]


def _meteor(answer: list[str], right: list[str]) -> float:
    runs = _runs(answer, right)
    if not runs:
        return 0.0
    precision, recall = sum(runs) / len(answer), sum(runs) / len(right)
    return (10 * precision * recall / (recall + 9 * precision)) * (
        1 - 0.5 * (len(runs) / sum(runs)) ** 3
    )


def _runs(a: list[str], b: list[str]) -> list[int]:
    """The lengths of the common runs of words, the longest taken first, no word used twice."""
    lengths, a, b = [], list(a), list(b)
    while True:
        run = SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
        if not run.size:
            return lengths
        # What is used up differs from side to side, so that it never matches again.
        a[run.a : run.a + run.size] = ["<"] * run.size
        b[run.b : run.b + run.size] = [">"] * run.size
        lengths.append(run.size)


def _grams(text: list[str], n: int) -> Counter:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def _cider(found: list[tuple[list[str], list[list[str]]]], n: int) -> list[float]:
    """The score of every sample for n-grams of one length."""
    seen = Counter(
        gram for _, right in found for gram in set().union(*(_grams(each, n) for each in right))
    )

    def weighed(text: list[str]) -> dict[tuple[str, ...], float]:
        counts = _grams(text, n)
        return {g: count * math.log(len(found) / max(1, seen[g])) for g, count in counts.items()}

    return [
        mean([_alike(weighed(answer), weighed(each), len(answer) - len(each)) for each in right])
        for answer, right in found
    ]


def _alike(a: dict, b: dict, longer: int) -> float:
    """The clipped cosine of two weighed counts, less for a difference in length."""
    lengths = math.hypot(*a.values()) * math.hypot(*b.values())
    clipped = sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
    return clipped / lengths * math.exp(-(longer**2) / 72) if lengths else 0.0
