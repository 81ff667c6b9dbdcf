"""Language models that are asked a question, and what can be read of their answers."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mllm_cl.stopping import Failed

if TYPE_CHECKING:
    from transformers import BatchEncoding

AGAIN = (408, 409, 429, 500, 502, 503, 504)  # after these a server may answer the next time
NOBODY = (ConnectionRefusedError, socket.gaierror)  # no use in waiting
TRIES = 6
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
BULLET = re.compile(r"^(?:\d{1,2}[.)]|[-*•–])\s+")


class Unusable(ValueError):
    """An answer that does not say what was asked."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would carry the key to whoever is named."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's chat completions: vLLM, llama.cpp, Ollama or a service.

    `url` is what ends in /v1; the key, if there is one, is sent nowhere else. A server that is busy
    is asked again after `pause` seconds, then twice as many and so on.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    pause: float = 1.0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        """ValueError for an address that is none, or that would have the key read on its way."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"found {self.url!r}, expected an address such as https://HOST/v1")
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                f"the address at {parts.hostname} has a name or a query in it, expected only what "
                "ends in /v1; a key belongs into the environment, under --key-variable"
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("the key holds a line break or another character that no key has")
        if self.key and parts.scheme == "http" and not _is_here(parts.hostname):
            raise ValueError(
                f"{self.url} would be sent the key for everybody on the way to read: take https, "
                "or a --key-variable that is not set"
            )

    def __call__(self, question: str, attempt: int) -> str:
        """The answer. Failed where there is none."""
        for tried in range(TRIES):
            try:
                return self._answer(question)
            except urllib.error.HTTPError as error:
                problem = f"{self.url} said {error.code} {error.reason}: {_begin(error)}"
                if error.code not in AGAIN:
                    raise Failed(problem) from None
                wait = _asked_to_wait(error.headers.get("Retry-After"))
            except (OSError, HTTPException, ValueError) as error:  # cut off, or no JSON
                problem, wait = f"{self.url}: {error}", 0.0
                nobody = isinstance(error, urllib.error.URLError) and error.reason
                if isinstance(nobody, NOBODY):
                    raise Failed(f"{problem}: is the server running there?") from None
            if tried + 1 < TRIES:
                time.sleep(min(max(wait, self.pause * 2**tried), LONGEST_WAIT))
        raise Failed(f"{problem} ({TRIES} times)")

    def _answer(self, question: str) -> str:
        end = "/chat/completions"
        url = self.url.rstrip("/").removesuffix(end) + end
        body = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        # A proxy would read what is sent to this machine itself.
        direct = [urllib.request.ProxyHandler({})] if _is_here(urlsplit(url).hostname) else []
        opener = urllib.request.build_opener(_Stay, *direct)
        with opener.open(request, timeout=self.timeout) as response:
            tree = json.loads(response.read())
        try:
            content = tree["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise Failed(f"{self.url} gave no choices: {json.dumps(tree)[:200]}") from None
        return content if isinstance(content, str) else ""  # null where all went into thoughts


class Local:
    """A language model of transformers, from a folder or the hub, in this process."""

    def __init__(self, model: str, *, max_new_tokens: int = 512) -> None:
        """ValueError where there is none."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        except OSError as error:
            raise ValueError(f"{model} has no language model: {error}") from None
        self.max_new_tokens = max_new_tokens
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())

    def __call__(self, question: str, attempt: int) -> str:
        """The likeliest answer; asked again, one that is drawn."""
        import torch

        tokens = self.tokens(question).to(self.model.device)
        torch.manual_seed(attempt)
        drawn = {"do_sample": True} if attempt else {"do_sample": False}
        found = self.model.generate(**tokens, max_new_tokens=self.max_new_tokens, **drawn)
        new = found[0, tokens["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True)

    def tokens(self, question: str) -> "BatchEncoding":
        """What the model reads."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(question, return_tensors="pt")
        chat = [{"role": "user", "content": question}]
        form = {"add_generation_prompt": True, "tokenize": False}
        text = self.tokenizer.apply_chat_template(chat, **form)
        # Where a chat begins and ends is in its template already.
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)


def listed(answer: str) -> list[str]:
    """The entries of a list. Unusable without any."""
    found = [entry for line in _lines(answer) if (entry := _entry(line))]
    if not found:
        raise Unusable("there is no list in it")
    return found


def sides(answer: str, one: str, other: str) -> list[list[str]]:
    """The entries under the two names, which may come in any order. Unusable where that of one is
    not there.

    Where no heading has a name in it, two lists under two headings are taken as they come.
    """
    blocks: list[tuple[str | None, list[str]]] = []
    for line in _lines(answer):
        name = _named(line, (one, other))
        if name is not None or (line.endswith(":") and not BULLET.match(line)):
            blocks.append((name, []))
        elif blocks and (entry := _entry(line)):
            blocks[-1][1].append(entry)
    found = {name: [entry for own, entries in blocks if own == name for entry in entries]
             for name in (one, other)}  # fmt: skip
    lists = [entries for _, entries in blocks if entries]
    if not any(name for name, _ in blocks) and len(lists) == 2:
        return lists
    lacking = [repr(name) for name, entries in found.items() if not entries]
    if lacking:
        raise Unusable(f"there is no list under {' or '.join(lacking)}")
    return list(found.values())


def _lines(answer: str) -> list[str]:
    """The lines that say something: no thoughts before the answer, and no fences around it."""
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    answer = answer.rpartition("</think>")[2].partition("<think>")[0]
    lines = (_bare(line) for line in answer.splitlines())
    return [line for line in lines if line and not line.startswith("```")]


def _bare(line: str) -> str:
    """A line without what makes it a heading or bold."""
    return re.sub(r"\*\*|__|`(?!``)|^\s*#+", "", line).strip()


def _entry(line: str) -> str:
    """What a line of a list says, empty where it is none."""
    return BULLET.sub("", line).strip(" .;,:") if BULLET.match(line) else ""


def _named(line: str, names: tuple[str, str]) -> str | None:
    """The name that a line is the heading of: it is all that is there, or all of the two that is
    in a line that ends with a colon.
    """
    text = BULLET.sub("", line).casefold()
    for name in names:
        if text.rstrip(": ") == name.casefold() and (text.endswith(":") or not BULLET.match(line)):
            return name
    if not text.endswith(":"):
        return None
    left, found = text, []
    for name in sorted(names, key=len, reverse=True):  # "wild cat" before "cat"
        own = re.compile(rf"(?<!\w){re.escape(name.casefold())}(?!\w)")
        found += [name] if own.search(left) else []
        left = own.sub("", left)
    return found[0] if len(found) == 1 else None


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _asked_to_wait(header: str | None) -> float:
    """The seconds of a Retry-After; 0 where it is a date or nothing."""
    return float(header) if header is not None and header.strip().isdecimal() else 0.0


def _begin(answer: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of an error, on one line; empty where it is cut off."""
    try:
        return " ".join(answer.read(2000).decode("utf-8", "replace").split())[:200]
    except (OSError, HTTPException):
        return ""
