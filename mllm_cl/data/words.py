"""Which of some words a caption says, in any of their forms; and which one a picture belongs to."""

import re
from collections.abc import Mapping, Sequence

# What the rules below do not make: past tense and participle, and any other form.
IRREGULAR = {
    "be": ("am", "is", "are", "was", "were", "been"),
    "blow": ("blew", "blown"),
    "break": ("broke", "broken"),
    "build": ("built",),
    "catch": ("caught",),
    "come": ("came",),
    "cut": ("cut",),
    "dig": ("dug",),
    "draw": ("drew", "drawn"),
    "drink": ("drank", "drunk"),
    "drive": ("drove", "driven"),
    "eat": ("ate", "eaten"),
    "fall": ("fell", "fallen"),
    "feed": ("fed",),
    "fight": ("fought",),
    "fly": ("flew", "flown"),
    "give": ("gave", "given"),
    "go": ("went", "gone"),
    "hang": ("hung",),
    "have": ("has", "had"),
    "hit": ("hit",),
    "hold": ("held",),
    "lead": ("led",),
    "leave": ("left",),
    "lie": ("lay", "lain"),
    "make": ("made",),
    "put": ("put",),
    "read": ("read",),
    "ride": ("rode", "ridden"),
    "run": ("ran",),
    "see": ("saw", "seen"),
    "sell": ("sold",),
    "shoot": ("shot",),
    "sing": ("sang", "sung"),
    "sit": ("sat",),
    "sleep": ("slept",),
    "slide": ("slid",),
    "speak": ("spoke", "spoken"),
    "stand": ("stood",),
    "sweep": ("swept",),
    "swim": ("swam", "swum"),
    "swing": ("swung",),
    "take": ("took", "taken"),
    "tell": ("told",),
    "throw": ("threw", "thrown"),
    "wear": ("wore", "worn"),
    "win": ("won",),
    "write": ("wrote", "written"),
}


def forms(word: str) -> frozenset[str]:
    """The word and what English makes of it as a verb, or in the plural: run, runs, running, ran.

    A last consonant is doubled in words of one syllable (stop, stopped), not in longer ones, where
    that depends on the stress.
    """
    doubled = word + word[-1] if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", word) else word
    past = IRREGULAR.get(word, (_past(word, doubled),))
    return frozenset({word, _plural(word), _continuous(word, doubled), *past})


def tokens(text: str) -> frozenset[str]:
    """The words of a text in lower case; parts of one with a hyphen are words of their own."""
    return frozenset(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold()))


def assigned(
    captions: Sequence[str], words: Mapping[str, frozenset[str]], assign: str
) -> str | None:
    """The word that a picture with these captions belongs to, None: none of them.

    `words` are words and their forms. With `assign` "first" it is the first that any caption says,
    with "majority" the one that most captions say, of equally many the first.
    """
    said = [tokens(caption) for caption in captions]
    counts = {word: sum(not own.isdisjoint(one) for one in said) for word, own in words.items()}
    found = [word for word, count in counts.items() if count]
    if assign == "majority":
        return max(found, key=counts.__getitem__, default=None)
    return next(iter(found), None)


def _plural(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh|o)$", word) else f"{word}s"


def _past(word: str, doubled: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ied"
    return f"{word}d" if word.endswith("e") else f"{doubled}ed"


def _continuous(word: str, doubled: str) -> str:
    if word.endswith("ie"):
        return f"{word[:-2]}ying"
    return f"{word[:-1]}ing" if re.search(r"[^eoy]e$", word) else f"{doubled}ing"
