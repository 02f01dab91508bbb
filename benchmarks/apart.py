"""Work in a process of its own, forked when all is imported: it may crash or be ended, and leaves the rest alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch


def apart(work: Callable[[], Iterable[Any]], limit: int) -> list[Any]:
    """What ``work`` yields (JSON values) within ``limit`` seconds of its processor time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        torch.set_num_threads(1)
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.alarm(20 * limit)
        with os.fdopen(writing, "w") as pipe:
            for each in work():
                pipe.write(json.dumps(each) + "\n")
                pipe.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = [json.loads(line) for line in pipe]
    os.waitpid(child, 0)
    return found
