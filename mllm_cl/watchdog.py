"""One of many processes that fails, ends or stands still ends them all, and is what the user reads
about: the others, whose collectives break in consequence, say so in a line each.

No process sees another, so each tells where it is over the launch's store, from a thread of its
own.
"""

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerCallback

from mllm_cl import engine
from mllm_cl.data.errors import DataError
from mllm_cl.recipe import RecipeError
from mllm_cl.stopping import Failed, Stopped

PERIOD, GRACE = 1.0, 5.0  # seconds between two looks, and to end by oneself after a loss. ours
LOADING, SAVING, WRITING = "loading", "saving", "writing"  # may take any time
DONE, STOPPED = "done", "stopped"
# For these the command line has words.
SAID = (Stopped, Failed, RecipeError, DataError, FloatingPointError, KeyboardInterrupt)


class Watchdog:
    """Open around what several processes do together; where there is one it does nothing.

    `phase` says what begins, on all processes alike, and `beat` that something of it was done. A
    process that others have been ahead of for a third of `timeout` seconds, while it made no beat,
    stands still: it says where, and ends. Where all are at the same beat, the limit is `timeout`.
    Loading, saving and writing have none but that of the collectives in which the others wait.

    An error that another process caused leaves as SystemExit(1).
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.place, self.store = timeout, (0, 0, LOADING), None
        self.stood, self.since, self.lost_at = None, 0.0, None
        self.over, self.main = threading.Event(), threading.get_ident()

    def __enter__(self) -> "Watchdog":
        if engine.launched_processes() > 1:
            self.store = engine.meeting_point()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def phase(self, name: str) -> None:
        """Something else begins."""
        self.place = (self.place[0] + 1, 0, name)

    def beat(self, *ignored) -> None:
        """Something was done; a hook's arguments are ignored."""
        number, count, name = self.place
        self.place = (number, count + 1, name)

    def follow(self, model: nn.Module) -> None:
        """Beat before and after every forward pass, which all processes make alike."""
        if engine.launched_processes() > 1:
            model.register_forward_pre_hook(self.beat)
            model.register_forward_hook(self.beat)

    def __exit__(self, kind, error, trace) -> None:
        self.over.set()
        if self.store is None:
            return
        # Or it could publish an older place after what is published here.
        self.thread.join(2 * PERIOD)
        told = f"{kind.__name__}: {error}" if kind else ""
        mine = STOPPED if kind is Stopped else f"{_me()} failed in {self.place[2]}: {told}"
        try:
            if error is None:
                self.phase(DONE)
                self._publish()
                return
            if isinstance(error, RuntimeError):
                # A collective breaks before its cause has spoken; SIGTERM follows on its heels.
                with contextlib.suppress(Stopped):
                    time.sleep(PERIOD)
            first = self._first(mine)
        except RuntimeError:
            first = "the process that keeps the launch's store has ended"
        if first == mine and not isinstance(error, SAID):
            _say(f"{_me()} failed in {self.place[2]}:")
            engine.tell_launcher(error)
        if isinstance(error, (RuntimeError, Stopped)) and not first.endswith(told):
            if first == STOPPED:
                raise Stopped from None
            _say(f"{_me()} ends: {first}")
            raise SystemExit(1) from None

    def _watch(self) -> None:
        while not self.over.is_set():
            # RuntimeError: the store is not there yet, or not any more.
            with contextlib.suppress(RuntimeError):
                self.store = self.store or engine.meeting_point()
                if self.store is not None:
                    self._look()
            self.over.wait(PERIOD)

    def _look(self) -> None:
        self._publish()
        place, limit, now = self.place, self._limit(), time.monotonic()
        if (place, limit) != self.stood:
            self.stood, self.since = (place, limit), now
        still = f"{_me()} stood still for {now - self.since:.0f} s in {place[2]}"
        first = self._first(still if now - self.since > limit else "")
        if first in ("", STOPPED) or self.over.is_set():
            return
        self.lost_at = self.lost_at or now
        # The others have a while to end by themselves, unless their collectives do not break.
        if first == still or now - self.lost_at > GRACE:
            stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
            _say(f"{still}:\n{stack}" if first == still else f"{_me()} ends: {first}")
            os._exit(1)

    def _limit(self) -> float:
        """How long this process may stay at this beat."""
        peers, mine = self._peers().values(), self.place[:2]
        if not peers or self.place[2] in (LOADING, SAVING, WRITING):
            return math.inf
        if any(tuple(peer["at"]) > mine for peer in peers):
            return self.timeout / 3
        return self.timeout if all(tuple(peer["at"]) == mine for peer in peers) else math.inf

    def _publish(self) -> None:
        told = {"at": self.place[:2], "phase": self.place[2], "pid": os.getpid(), "on": _machine()}
        self.store.set(str(engine.rank()), json.dumps(told))

    def _peers(self) -> dict[int, dict]:
        """What the others published last; nothing before all have."""
        ranks = [rank for rank in range(engine.launched_processes()) if rank != engine.rank()]
        keys = [str(rank) for rank in ranks]
        told = self.store.multi_get(keys) if self.store.check(keys) else []
        return {rank: json.loads(text) for rank, text in zip(ranks, told, strict=False)}

    def _first(self, mine: str) -> str:
        """What ended the run first, as all agree: one that was killed, else `mine`, if nothing did
        before.
        """
        for rank, peer in self._peers().items():
            if peer["phase"] != DONE and peer["on"] == _machine() and _ended(peer["pid"]):
                ended = f"process {rank} of {engine.launched_processes()} has ended without a word"
                mine = f"{ended} (killed?), {_me()} was in {self.place[2]}"
        return self.store.compare_set("first", "", mine).decode()


class Steps(TrainerCallback):
    """Tells a watchdog which step of its task a Trainer is at."""

    def __init__(self, watchdog: Watchdog, trainer: Trainer) -> None:
        self.watchdog, self.trainer, self.task = watchdog, trainer, trainer.task.name

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # DDP waits for the others before the model's own forward.
        self.watchdog.follow(self.trainer.model_wrapped)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.watchdog.phase(f"step {state.global_step + 1} of {self.task}")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        after = f"{self.task} after step {state.global_step}"
        self.watchdog.phase(SAVING if control.should_save else after)

    def on_save(self, args, state, control, **kwargs) -> None:
        self.watchdog.phase(f"{self.task} after step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.watchdog.phase(f"measuring {self.task}")


def _me() -> str:
    return f"process {engine.rank()} of {engine.launched_processes()}"


def _machine() -> list[str]:
    """Where a process number means the same process."""
    numbers = Path("/proc/self/ns/pid")
    return [socket.gethostname(), os.readlink(numbers)] if numbers.is_symlink() else [_me()]


def _ended(pid: int) -> bool:
    """Whether a process of this machine is no more, but for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _say(text: str) -> None:
    print(f"mllm-cl: {text}", file=sys.stderr, flush=True)
