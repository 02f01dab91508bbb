"""A process that has seen neither the pass nor the model: saved programs are loaded and run in it.

One process is started, which imports torch and the reader of files and nothing else; each file is read in a fork of it.
Where the system cannot fork, each file is read in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Self

import torch

from rewrite.files.store import load
from rewrite.torch_private import pytree

from .observe import Observed, observe

_SERVE = "from rewrite.testing.fresh import serve; serve()"


class FreshProcess:
    """Loads and runs saved programs elsewhere; a context manager, or ``close`` it. Started when first used."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def observed(self, file: Path) -> dict[bool, Observed]:
        """What a saved program does on its example inputs, by whether it trains.

        Raises RuntimeError with the traceback of whatever goes wrong there.
        """
        target = file.with_suffix(".observed")
        answer = self._ask({"file": str(file), "target": str(target), "threads": torch.get_num_threads()})
        if answer["error"]:
            raise RuntimeError(answer["error"])
        found = torch.load(target, weights_only=True)
        return {train: Observed(**each) for train, each in found.items()}

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self.process = self.process or _started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the fresh process ended"}
        if not line or not hasattr(os, "fork"):
            self.close()
        return answer

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _started() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def serve() -> None:
    """Answer questions, one a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a loaded model prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps({"error": _forked(json.loads(line))}) + "\n")
        answers.flush()


def _forked(question: dict[str, Any]) -> str:
    """Answer in a fork, so that the next question finds a process that has loaded nothing; the error, if any."""
    if not hasattr(os, "fork"):
        return _answered(question)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(_answered(question))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        error = pipe.read()
    _, status = os.waitpid(child, 0)
    return error or (f"it ended with status {status}" if status else "")


def _answered(question: dict[str, Any]) -> str:
    try:
        torch.set_num_threads(question["threads"])
        program = load(question["file"])
        args, kwargs = program.example_args, dict(program.example_kwargs)
        found = {train: vars(observe(program.clone().module, args, kwargs, train=train)) for train in (False, True)}
        for each in found.values():
            each["structure"] = None  # its classes are not for a file
        torch.save(pytree.tree_map_only(torch.nn.Parameter, lambda p: p.detach(), found), question["target"])
    except BaseException:
        return traceback.format_exc()
    return ""
