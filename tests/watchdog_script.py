"""Pairs of processes that only watch each other, each pair with a store of its own, of which
something ends: prints, as JSON, what each process of each pair said and how it ended.

    killed       process 1, on another machine, is killed
    suspended    process 1 is suspended
    interrupted  process 1 is interrupted, and the collective of process 0 breaks
    store gone, store silent    the process that keeps the store is killed, or suspended
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from mllm_cl import watchdog

TIMEOUT = 18.0  # of a collective: a sixth of it without a word
CASES = {
    "killed": (1, signal.SIGKILL),
    "suspended": (1, signal.SIGSTOP),
    "interrupted": (1, signal.SIGINT),
    "store gone": (None, signal.SIGKILL),
    "store silent": (None, signal.SIGSTOP),
}


def fork(said: Path, work, *words) -> int:
    """The number of a new process that does `work` and writes what it says to a file."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        try:
            work(*words)
        except KeyboardInterrupt:
            os._exit(130)
        except SystemExit as ends:
            os._exit(ends.code)
        os._exit(0)
    return child


def keep_store(port: int) -> None:
    store = TCPStore("localhost", port, is_master=True, timeout=timedelta(seconds=30))
    time.sleep(1000)
    del store


def watch(case: str, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if case == "killed":
        socket.gethostname = lambda: f"machine {rank}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with watchdog.Watchdog(TIMEOUT) as watched:
        watched.phase("step 1")
        broken = time.monotonic() + 4 if (case, rank) == ("interrupted", 0) else float("inf")
        while time.monotonic() < broken:
            watched.beat()
            time.sleep(0.05)
        raise RuntimeError("Connection closed by peer")


def start(case: str, folder: Path) -> tuple[list[int], int]:
    """The processes of a pair, and the one that keeps their store."""
    with socket.socket() as opened:
        opened.bind(("", 0))
        port = opened.getsockname()[1]
    store = fork(folder / f"{case} store", keep_store, port)
    return [fork(folder / f"{case} {rank}", watch, case, rank, port) for rank in (0, 1)], store


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place), {}
        pairs = {case: start(case, folder) for case in CASES}
        time.sleep(3)
        for case, (pair, store) in pairs.items():
            whom, what = CASES[case]
            os.kill(store if whom is None else pair[whom], what)
        for case, (pair, _) in pairs.items():
            code = os.waitstatus_to_exitcode(os.waitpid(pair[0], 0)[1])
            found[case] = [code, (folder / f"{case} 0").read_text()]
        for pair, store in pairs.values():
            for child in (pair[1], store):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
