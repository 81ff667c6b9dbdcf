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
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerCallback

from mllm_cl import engine
from mllm_cl.data.errors import DataError
from mllm_cl.recipe import RecipeError
from mllm_cl.stopping import Failed, Stopped, process

PERIOD, GRACE = 1.0, 5.0  # seconds between two looks, and to end by oneself after a loss. ours
LOADING, SAVING, WRITING = "loading", "saving", "writing"  # may take any time
DONE, STOPPED = "done", "stopped"
NO_STORE = "the process that keeps the launch's store has ended, or its machine does not answer"
# For these the command line has words.
SAID = (Stopped, Failed, RecipeError, DataError, FloatingPointError, KeyboardInterrupt)


class Watchdog:
    """Open around what several processes do together; where there is one it does nothing.

    `phase` says what begins, on all processes alike, and `beat` that something of it was done. A
    process that others have been ahead of for a third of `timeout` seconds, while it made no beat,
    stands still: it says where, and ends. Where all are at the same beat, the limit is `timeout`.
    Loading, saving and writing have none but that of the collectives in which the others wait.

    Who is alive says so in any phase, by counting: one that does not for a sixth of `timeout`
    (killed, suspended, or its machine is gone) is named by the others, which end. They also end
    where the store does not answer for as long.

    An error that another process caused leaves as SystemExit(1).
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.place = timeout, (0, 0, LOADING)
        self.store, self.store_is_gone = None, False
        self.looks, self.heard = 0, {}  # how often this one has counted; what others did, and when
        self.stood, self.since, self.lost_at = None, 0.0, None
        self.over, self.main, self.thread = threading.Event(), threading.get_ident(), None

    def __enter__(self) -> "Watchdog":
        if engine.launched_processes() > 1:
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

    def close(self) -> None:
        """Look no more: processes may end from here on, and with them the launch's store."""
        self.over.set()

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        if self.thread is None:
            return
        # Or it could publish an older place after what is published here.
        self.thread.join(GRACE)
        if self.store is None:
            return
        if error is not None:
            self._leave(error)
        elif not (self.store_is_gone or self.thread.is_alive()):
            self.phase(DONE)
            with contextlib.suppress(RuntimeError):  # all is done: nobody needs the store any more
                self._publish()

    def _leave(self, error: BaseException) -> None:
        """Agree with the others on what ended the run, and say it where it was not this process."""
        told = f"{type(error).__name__}: {error}"
        mine = f"{process()} failed in {self.place[2]}: {told}"
        if isinstance(error, Stopped):
            mine = STOPPED
        if isinstance(error, KeyboardInterrupt):
            mine = f"{process()} was interrupted"
        first = self._agreed(mine, error)
        if first == mine and not isinstance(error, SAID):
            _say(f"{process()} failed in {self.place[2]}:")
            engine.tell_launcher(error)
        if isinstance(error, Stopped) and first == NO_STORE:
            return  # it was asked to, and so was the one with the store
        if isinstance(error, (RuntimeError, Stopped)) and not first.endswith(told):
            if first == STOPPED:
                raise Stopped from None
            # Without a store nobody knows whose fault it was.
            own = f" ({told.splitlines()[0]})" if first == NO_STORE else ""
            _say(f"{process()} ends: {first}{own}")
            raise SystemExit(1) from None

    def _agreed(self, mine: str, error: BaseException) -> str:
        """What ended the run first: `mine`, if the others know of nothing else."""
        # A thread that lives waits for the store, and so would this one.
        if self.store_is_gone or self.thread.is_alive():
            return NO_STORE
        try:
            if isinstance(error, RuntimeError):
                # A collective breaks before its cause has spoken; SIGTERM follows on its heels.
                with contextlib.suppress(Stopped):
                    time.sleep(PERIOD)
            return self._first(self._ended() or mine)
        except RuntimeError:
            return NO_STORE

    def _watch(self) -> None:
        while not self.over.is_set():
            # The machine of a store may be gone, so that nobody refuses the question either.
            look = threading.Thread(target=self._look, daemon=True)
            look.start()
            look.join(self.timeout / 6)
            while look.is_alive():
                if self.store is not None:
                    self._end(NO_STORE)
                look.join(PERIOD)
            self.over.wait(PERIOD)

    def _look(self) -> None:
        if self.store_is_gone:  # asked once more, torch would print a trace once more
            self._end(NO_STORE)
            return
        try:
            self.store = self.store or engine.meeting_point()
            if self.store is not None:
                self._compare()
        except RuntimeError:  # the store is not there yet, or not any more
            self.store_is_gone = self.store is not None

    def _compare(self) -> None:
        """Tell the others where this process is, and end it where it or the run has failed."""
        self.looks += 1
        self._publish()
        peers, place, now = self._peers(), self.place, time.monotonic()
        limit = self._limit(peers, place)
        if (place, limit) != self.stood:
            self.stood, self.since = (place, limit), now
        still = f"{process()} stood still for {now - self.since:.0f} s in {place[2]}"
        mine = still if now - self.since > limit else ""
        first = self._first(self._ended(peers) or self._silent(peers, now) or mine)
        if first in ("", STOPPED):
            self.lost_at = None
        elif first == still and not self.over.is_set():
            stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
            _say(f"{still}:\n{stack}")
            os._exit(1)
        else:
            self._end(first)

    def _end(self, first: str) -> None:
        """End, if the main thread has not for a while: its collectives may not break."""
        self.lost_at = self.lost_at or time.monotonic()
        if time.monotonic() - self.lost_at > GRACE and not self.over.is_set():
            _say(f"{process()} ends: {first}")
            os._exit(1)

    def _limit(self, peers: Mapping[int, dict], place: tuple[int, int, str]) -> float:
        """How long this process may stay at this beat."""
        if not peers or place[2] in (LOADING, SAVING, WRITING):
            return math.inf
        if any(tuple(peer["at"]) > place[:2] for peer in peers.values()):
            return self.timeout / 3
        together = all(tuple(peer["at"]) == place[:2] for peer in peers.values())
        return self.timeout if together else math.inf

    def _publish(self) -> None:
        number, count, name = self.place
        told = {"at": (number, count), "phase": name, "looks": self.looks}
        told |= {"pid": os.getpid(), "on": _machine()}
        self.store.set(str(engine.rank()), json.dumps(told))

    def _peers(self) -> dict[int, dict]:
        """What the others published last; nothing before all have."""
        ranks = [rank for rank in range(engine.launched_processes()) if rank != engine.rank()]
        keys = [str(rank) for rank in ranks]
        told = self.store.multi_get(keys) if self.store.check(keys) else []
        return {rank: json.loads(text) for rank, text in zip(ranks, told, strict=False)}

    def _first(self, mine: str) -> str:
        """What ended the run first, as all agree: `mine`, if nothing did before."""
        return self.store.compare_set("first", "", mine).decode()

    def _ended(self, peers: Mapping[int, dict] | None = None) -> str:
        """A process of this machine that is no more, as a sentence; empty if there is none."""
        for rank, peer in (self._peers() if peers is None else peers).items():
            if peer["phase"] != DONE and peer["on"] == _machine() and _is_gone(peer["pid"]):
                ended = f"{process(rank)} has ended without a word (killed?)"
                return f"{ended}, {process()} was in {self.place[2]}"
        return ""

    def _silent(self, peers: Mapping[int, dict], now: float) -> str:
        """A process of any machine that does not count any more, as a sentence; or empty."""
        found = ""
        for rank, peer in peers.items():
            count, since = self.heard.get(rank, (None, now))
            if peer["looks"] != count or peer["phase"] == DONE:
                self.heard[rank] = (peer["looks"], now)
            elif now - since > self.timeout / 6:
                lost = f"{process(rank)} was not heard of for {now - since:.0f} s"
                found = f"{lost} in {peer['phase']} (suspended, or its machine is gone?)"
        return found


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

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:
            self.watchdog.phase(SAVING)

    def on_save(self, args, state, control, **kwargs) -> None:
        self.watchdog.phase(f"{self.task} after step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.watchdog.phase(f"measuring {self.task}")


def _machine() -> list[str]:
    """Where a process number means the same process."""
    numbers = Path("/proc/self/ns/pid")
    return [socket.gethostname(), os.readlink(numbers)] if numbers.is_symlink() else [process()]


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine is no more, but for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _say(text: str) -> None:
    print(f"mllm-cl: {text}", file=sys.stderr, flush=True)
