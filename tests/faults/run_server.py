"""Starts runs of tools/train_net.py at once: imports everything one time, then forks a process for each run.

Orders come as JSON lines on standard input, answers go to standard output. A run may carry a `kill`:
this process sends itself SIGKILL some milliseconds after a function of that name was entered for the n-th time.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
PROBE_SECONDS = 0.0002


def kill_inside(function: str, entry: int, delay: float) -> None:
    """Watch all other threads' stacks, and kill this process inside `function`."""
    own, inside, seen = threading.get_ident(), False, 0
    while True:
        stacks = [frame for thread, frame in sys._current_frames().items() if thread != own]
        was_inside, inside = inside, any(function in names(frame) for frame in stacks)
        seen += inside and not was_inside
        if seen >= entry:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PROBE_SECONDS)


def names(frame: FrameType | None) -> set[str]:
    """Names of the functions on a stack."""
    found = set()
    while isinstance(frame, FrameType):  # the other threads run on meanwhile: what was a frame may be gone
        found.add(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)
        frame = frame.f_back
    return found


def start(tool, order: dict) -> int:
    """Fork a run; its process number."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    if "memory" in order:
        resource.setrlimit(resource.RLIMIT_AS, (order["memory"], order["memory"]))
    sys.argv = ["train_net.py", *order["arguments"]]
    if order.get("kill"):
        threading.Thread(target=kill_inside, kwargs=order["kill"], daemon=True).start()
    try:
        code = tool.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve until standard input ends."""
    sys.path.insert(0, str(ROOT))
    tool = importlib.import_module("tools.train_net")
    for module in ("engine.defaults", "engine.data.loaders", "torch.utils.tensorboard"):  # a run imports them late
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        order = json.loads(line)
        if "arguments" in order:
            print(start(tool, order), file=answers)
        else:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            print("null" if pid == 0 else os.waitstatus_to_exitcode(status), file=answers)


if __name__ == "__main__":
    main()
