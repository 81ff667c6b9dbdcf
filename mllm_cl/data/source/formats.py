"""What rows look like, and how a row of any format becomes a chat and the pictures it refers to.

messages    messages: [{role, content}], images
LLaVA       conversations: [{from, value}], image    ShareGPT: the same with images, or none
Alpaca      instruction, input, output               columns: image, question, answer
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_cl.data.errors import DataError, shortened
from mllm_cl.data.source.arrow import Row

MARK = "<image>"
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
    "system": "system",
}
# Names of columns in the order in which they are taken, compared in lower case, "-" and " " as "_".
CHAT = ("messages", "conversations", "conversation")
IMAGE = ("images", "image", "image_path", "image_paths", "image_file", "img", "img_path", "picture")
IMAGE += ("photo", "file_name", "filename")
QUESTION = ("question", "query", "instruction", "prompt", "problem", "input", "text", "sentence")
ANSWER = ("answer", "answers", "output", "response", "completion", "target", "label", "class_name")
ANSWER += ("caption", "solution")

Message = dict[str, Any]
Chat = tuple[list[Message], list[object], list[str]]


@dataclass(frozen=True)
class Format:
    """How the rows of a data set are read: which column is what.

    `chat` holds the turns of a conversation; without it a row is one `question`, with `context`
    below it where that is not empty, or `prompt` with {column} filled in, and one `answer`.
    `image` None stands for whichever of the usual names a row has: some rows may have no picture.
    """

    name: str
    columns: tuple[str, ...]
    chat: str | None = None
    question: str | None = None
    context: str | None = None
    prompt: str | None = None
    answer: str | None = None
    image: str | None = None

    def read(self, row: Row) -> Chat:
        """Messages in typed parts, references to pictures, and right answers if there are several.

        DataError where the row is not what the format says.
        """
        images = self.pictures_of(row)
        if self.chat is not None:
            messages, inline = _turns(self._value(row, self.chat))
            references: list[str] = []
            images = inline or images
            if self.name == "messages":
                messages = _placed_first(messages, len(images))
        else:
            answer, references = _answer(self._value(row, self.answer))
            asked = _parts(self._question(row), places=True)
            messages = _placed_first([_message("user", asked)], len(images))
            messages.append(_message("assistant", [_text_part(answer)]))
        if not _absent(row.get("system")):
            system = _text(row["system"], "'system'")
            messages.insert(0, _message("system", [_text_part(system)]))
        _check(messages, len(images))
        return messages, images, references

    def pictures_of(self, row: Row) -> list[object]:
        """The references to the pictures of a row, those inside of a chat left out."""
        return _listed(self._images(row))

    def pictures(self) -> list[str]:
        """The columns in which pictures are looked for."""
        if self.image is not None:
            return [self.image]
        return [each for each in self.columns if _plain(each) in IMAGE]

    def unused(self) -> list[str]:
        """The columns that nothing is read from."""
        used = {self.chat, self.question, self.context, self.answer, "id", "system"}
        used |= {*re.findall(r"\{([^{}]+)\}", self.prompt or ""), *self.pictures()}
        return [each for each in self.columns if each not in used]

    def _images(self, row: Row) -> object:
        if self.image is not None:
            return self._value(row, self.image)
        by_name = {_plain(name): value for name, value in row.items()}
        found = (by_name.get(name) for name in IMAGE)
        return next((value for value in found if not _absent(value)), None)

    def _question(self, row: Row) -> str:
        if self.prompt is not None:
            return re.sub(r"\{([^{}]+)\}", lambda m: _flat(self._value(row, m[1])), self.prompt)
        question = _text(self._value(row, self.question), self.question)
        context = "" if self.context is None else row.get(self.context)
        return question if _absent(context) else f"{question}\n{_text(context, self.context)}"

    def _value(self, row: Row, column: str | None) -> Any:
        assert column is not None
        if column not in row:
            raise DataError(f"has no {column!r}; it has {', '.join(map(str, row)) or 'nothing'}")
        return row[column]


def detect(columns: Iterable[str], given: Mapping[str, str | None], file: str) -> Format:
    """The format of rows with these columns; `given` may name image, question, answer, prompt.

    DataError with the columns that were found where it cannot be told.
    """
    columns = tuple(columns)
    by_name = {_plain(name): name for name in reversed(columns)}
    for key in ("image", "question", "answer"):
        if given.get(key) is not None and given[key] not in columns:
            found = f"args.{key} names {given[key]!r}, but the columns are {', '.join(columns)}"
            raise DataError(found, file)
    image, prompt = given.get("image"), given.get("prompt")
    chat = next((by_name[name] for name in CHAT if name in by_name), None)
    chosen = [key for key in ("question", "answer", "prompt") if given.get(key) is not None]
    if chat is not None and not chosen:
        name = "messages" if _plain(chat) == "messages" else "ShareGPT"
        name = "LLaVA" if name == "ShareGPT" and "image" in by_name else name
        return Format(name, columns, chat=chat, image=image)
    answer = given.get("answer") or _first(by_name, ANSWER)
    question = given.get("question") or _first(by_name, QUESTION, but=answer)
    missing = [] if answer else ["answer"]
    missing += [] if question or prompt else ["question"]
    if missing:
        what = " and ".join(missing)
        raise DataError(
            f"found the columns {', '.join(columns)}, and none that is the {what} by its name; "
            f"write args: {{{missing[0]}: COLUMN}}"
            + (", or prompt: 'the same question for all'" if "question" in missing else ""),
            file,
        )
    for column in re.findall(r"\{([^{}]+)\}", prompt or ""):
        if column not in columns:
            found = f"args.prompt names {{{column}}}, but the columns are {', '.join(columns)}"
            raise DataError(found, file)
    alpaca = question == by_name.get("instruction")
    return Format(
        "Alpaca" if alpaca else "columns",
        columns,
        question=None if prompt else question,
        context=by_name.get("input") if alpaca and not prompt else None,
        prompt=prompt,
        answer=answer,
        image=image,
    )


def _first(by_name: Mapping[str, str], names: Sequence[str], but: str | None = None) -> str | None:
    return next((by_name[n] for n in names if n in by_name and by_name[n] != but), None)


def _turns(turns: object) -> tuple[list[Message], list[object]]:
    """Messages, and the pictures that stand inside their parts."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"found {shortened(turns)} where a list of turns is expected")
    messages, inline = [], []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"turn {number} is {shortened(turn)}, expected a role and a text")
        role = turn.get("role") if turn.get("role") is not None else turn.get("from")
        content = next((turn[key] for key in ("content", "value", "text") if turn.get(key)), "")
        if not isinstance(role, str) or role.lower() not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"turn {number} has the role {shortened(role)}, not one of {known}")
        role = ROLES[role.lower()]
        parts, pictures = _content(content, places=role == "user")
        inline += pictures
        messages.append(_message(role, parts))
    return messages, inline


def _content(content: object, *, places: bool) -> tuple[list[dict], list[object]]:
    if not isinstance(content, list):
        return _parts(_text(content, "a turn"), places=places), []
    parts, pictures = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append(_text_part(_text(part.get("text"), "a text part")))
        elif kind in ("image", "image_url"):
            keys = ("image", "image_url", "path", "url", "bytes")
            own = next((part[key] for key in keys if part.get(key) is not None), None)
            pictures += [] if own is None else [own.get("url") if _is_url(own) else own]
            parts.append({"type": "image"})
        else:
            raise DataError(f"a turn has the part {shortened(part)}, expected a text or an image")
    return parts, pictures


def _is_url(part: object) -> bool:
    return isinstance(part, Mapping) and "url" in part


def _parts(text: str, *, places: bool) -> list[dict]:
    """The text in parts, with a picture wherever it says <image>."""
    if MARK not in text:
        return [_text_part(text)]
    if not places:
        raise DataError(f"says {MARK} where no picture can be, outside of the user's turns")
    pieces = [piece.strip("\n") for piece in text.split(MARK)]
    told = [number for number, piece in enumerate(pieces) if piece.strip()]
    if told:  # spaces between words and pictures stay, those around the whole go
        pieces[told[0]] = pieces[told[0]].lstrip()
        pieces[told[-1]] = pieces[told[-1]].rstrip()
    parts: list[dict] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [_text_part(piece)] if piece.strip() else []
    return parts


def _placed_first(messages: list[Message], number: int) -> list[Message]:
    """Where no text says <image>, the pictures come before the user's first words."""
    if number and not any(part["type"] == "image" for m in messages for part in m["content"]):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = [{"type": "image"}] * number + first["content"]
    return messages


def _check(messages: Sequence[Message], number: int) -> None:
    slots = sum(part["type"] == "image" for m in messages for part in m["content"])
    if slots != number:
        raise DataError(f"the text refers to {slots} pictures ({MARK}), the row has {number}")
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or "user" not in roles:
        found = ", ".join(roles)
        raise DataError(f"the turns are {found}; expected the user's and, last, the assistant's")


def _answer(value: object) -> tuple[str, list[str]]:
    """The answer, the most frequent of several; and all of them, where there are several."""
    if not isinstance(value, list):
        return _text(value, "the answer"), []
    several = [each.get("answer") if isinstance(each, Mapping) else each for each in value]
    texts = [_text(each, "an answer") for each in several]
    if not texts:
        raise DataError("the list of answers is empty")
    return Counter(texts).most_common(1)[0][0], texts if len(texts) > 1 else []


def _text(value: object, what: str | None) -> str:
    """The value as text that is not empty and can be encoded."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, (int, float)) and not math.isnan(value):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{what} is {shortened(value)}, expected text")
    if not value.strip():
        raise DataError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not text in UTF-8: {shortened(value)}") from None
    return value


def _flat(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_text(each, "a column of the prompt") for each in value)
    return _text(value, "a column of the prompt")


def _listed(value: object) -> list[object]:
    """A list of pictures (or turns) of what may be one, several or none."""
    if _absent(value):
        return []
    many = isinstance(value, list) and not isinstance(value[0], (list, int, float))
    return value if many else [value]


def _absent(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(each is None for each in value.values())
    missing = isinstance(value, float) and math.isnan(value)
    return value is None or missing or (isinstance(value, (str, list)) and not value)


def _message(role: str, parts: list[dict]) -> Message:
    if not parts:
        raise DataError(f"the {role}'s turn is empty")
    return {"role": role, "content": parts}


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _plain(name: object) -> str:
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")
