"""Runs the command line on hostile input in a process of its own, and says what it did that it must not.

A worker process imports the engine once and then runs case after case, with an audit hook that sees what Python does
(compile, exec, import, open, processes, sockets, libraries) and a look at the folders and the memory map for what native
code does. A case that hangs, or that kills the process, costs the worker; the next case gets a new one.

    with Oracle() as oracle:
        verdict = oracle.judge(Case(("show", "model.pt2"), folder))
        assert verdict.faults == ()

Hostile text carries ``MARKER``: where compiled or executed text holds it, text of the file was run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
MARKER = "zz_canary"
SECONDS = 20.0
"""What one case may take, of the processor."""
PATIENCE = 6
"""How many times as long it may take by the clock, for it may have to wait for the processor."""
BYTES = 2 << 30
"""What one case may add to the memory of its process."""

_PROCESSES = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.",
)
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown")
_CHANGES += ("shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree", "shutil.unpack_archive", "os.setxattr")
_RELATIVE = ("os.remove", "os.rmdir", "os.mkdir")
"""Those that name a path and, as their last argument, the open folder that it is relative to, or -1."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Case:
    """A command line after ``rewrite``, run in ``folder``.

    ``makes`` are the files that a run may leave there; ``baits`` modules that only the input asks for, whose import is a
    fault; ``lines`` how many lines an error may have (a mistake in a pipeline's text has three).
    """

    argv: tuple[str, ...]
    folder: Path
    makes: tuple[str, ...] = ()
    baits: tuple[str, ...] = ()
    lines: int = 1
    seconds: float = SECONDS


@dataclass(frozen=True)
class Verdict:
    """What a case did. ``code`` is None where it hung or died; ``faults`` is empty where all is well."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    faults: tuple[str, ...]


class Oracle:
    """Judges cases, one at a time, in a worker process that is started when it is needed."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def judge(self, case: Case) -> Verdict:
        """Run a case and compare what it did with what it may do."""
        before = _listing(case.folder)
        worker = self._ready()
        began = time.monotonic()
        answer = _ask(worker, {**asdict(case), "folder": str(case.folder)}, case.seconds)
        seconds = time.monotonic() - began
        if answer is None:
            fault = self._lost(worker) or f"took more than {case.seconds:.0f} s"
            answer = {"code": None, "stdout": "", "stderr": "", "faults": [fault]}
        answer["faults"] += _left(before, _listing(case.folder), case)
        answer["faults"] += _told(case, answer)
        return Verdict(answer["code"], answer["stdout"], answer["stderr"], seconds, tuple(answer["faults"]))

    def _lost(self, worker: subprocess.Popen[bytes]) -> str | None:
        """Close a worker that gave no answer, and say how it died; None where it lives.

        A dying process closes its pipe a moment before it can be waited for.
        """
        assert worker.stdout is not None
        ended = bool(select.select([worker.stdout], [], [], 0)[0])
        died = worker.wait(timeout=60) if ended else worker.poll()
        self.close()
        return None if died is None else f"killed the process (exit {died})"

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.harness"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            if _ask(self._worker, {}, 180.0) is None:
                raise RuntimeError("the worker does not start")
        return self._worker


def _ask(worker: subprocess.Popen[bytes], question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """The worker's answer, or None where there is none in time."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(question).encode() + b"\n")
    worker.stdin.flush()
    began, worked = time.monotonic(), _worked(worker)
    ready = select.select([worker.stdout], [], [], seconds)[0]
    while not ready and _worked(worker) - worked < seconds and time.monotonic() - began < PATIENCE * seconds:
        ready = select.select([worker.stdout], [], [], 1.0)[0]  # the machine is busy with something else
    line = worker.stdout.readline() if ready else b""
    found: dict[str, Any] | None = json.loads(line) if line else None
    return found


def _worked(worker: subprocess.Popen[bytes]) -> float:
    """The processor seconds that a worker has used; infinite where that cannot be told, or it ended."""
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, by its path there, with what tells that it was written."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns)
    return found


def _left(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], case: Case) -> list[str]:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    names = [name for name in changed if name not in case.makes and not Path(case.folder, name).is_dir()]
    names += [name for name in changed if name not in before and Path(case.folder, name).is_dir()]
    return [f"left or changed {name}" for name in names]


def _told(case: Case, answer: dict[str, Any]) -> list[str]:
    """Whether the exit code and the words are those of a tool: 0, or 2 with one line that says why."""
    code, text = answer["code"], answer["stderr"]
    lines = [line for line in text.splitlines() if line.strip()]
    faults = [] if code in (0, 2, None) else [f"exit {code}: {lines[-1] if lines else ''}"]
    if code == 2 and not 1 <= len(lines) <= case.lines:
        faults.append(f"{len(lines)} lines on stderr: {text[:500]!r}")
    if code == 0 and lines:
        faults.append(f"success with noise on stderr: {text[:500]!r}")
    if any(word in text for word in ("Traceback", "weights_only=False", "zz_internal")):
        faults.append(f"a traceback, or advice to switch safety off: {text[:500]!r}")
    return faults


# ---- the worker --------------------------------------------------------------------------------------------------


def _below(folder: int, path: Any) -> Any:
    """A path that is given relative to an open folder, as one of its own."""
    if folder < 0 or not isinstance(path, str | bytes):
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))


@dataclass
class _Hook:
    """The audit hook: it cannot be taken off, so it is armed for the time of a case."""

    folder: Path = Path("/")
    baits: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    armed: bool = False
    faults: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        fault = self._judged(event, arguments)
        if fault:
            self.faults.append(fault[:300])

    def _judged(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event.startswith(_PROCESSES) or event.startswith("socket."):
            return f"{event} {arguments!r}"
        if event == "ctypes.dlopen":  # the system's own libraries, by name, are what Python packages load
            name = str(arguments[0])
            strange = "/" in name and _is_strange(name, self.folder)
            return f"{event} of {name}" if strange or MARKER in name else None
        if event == "compile":
            return f"compiled text of the file: {arguments[0]!r}" if MARKER in str(arguments[0]) else None
        if event == "exec":
            return f"executed text of the file: {arguments[0]!r}" if _mentions(arguments[0]) else None
        if event == "import":
            name = str(arguments[0])
            chosen = MARKER in name or any(name == bait or name.startswith(f"{bait}.") for bait in self.baits)
            return f"imported {name}" if chosen else None
        if event == "open":
            path, _, flags = (*arguments, None, None)[:3]
            return self._written(event, path) if isinstance(flags, int) and flags & _WRITES else None
        if event in _CHANGES:
            paths = [_below(arguments[-1], arguments[0])] if event in _RELATIVE else arguments[:2]
            return next((f for path in paths if (f := self._written(event, path))), None)
        return None

    def _written(self, event: str, path: Any) -> str | None:
        """A fault unless the path lies in a staging folder, or is what this case may make."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        place = Path(os.path.abspath(os.fsdecode(path)))
        staged = any(part.endswith(".partial") for part in place.parts) or place == Path(os.devnull)
        made = place.parent == self.folder and place.name in self.makes
        return None if staged or made or (event == "os.mkdir" and place.is_dir()) else f"{event} of {place}"


def _mentions(code: Any) -> bool:
    if not isinstance(code, CodeType):
        return False
    if code.co_filename.startswith("/"):
        return False  # a module that is being imported
    held = [*code.co_names, *code.co_varnames, *(c for c in code.co_consts if isinstance(c, str))]
    return any(MARKER in name for name in held) or any(_mentions(c) for c in code.co_consts)


def _libraries() -> set[str]:
    """The files that are mapped into this process and executable."""
    lines = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []
    return {parts[5] for parts in (line.split(maxsplit=5) for line in lines) if len(parts) == 6 and "x" in parts[1]}


@contextlib.contextmanager
def _limited(more: int) -> Iterator[None]:
    """Memory beyond what the process has now is limited while the context lasts."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@contextlib.contextmanager
def _captured(names: Sequence[int]) -> Iterator[list[str]]:
    """File descriptors redirected to files; their text, in order, once the context is left."""
    kept = [os.dup(name) for name in names]
    files = [tempfile.TemporaryFile() for _ in names]  # noqa: SIM115, closed below
    texts: list[str] = []
    for name, file in zip(names, files, strict=True):
        os.dup2(file.fileno(), name)
    try:
        yield texts
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for name, old, file in zip(names, kept, files, strict=True):
            os.dup2(old, name)
            os.close(old)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()


def _run(case: dict[str, Any], hook: _Hook) -> dict[str, Any]:
    from rewrite.cli.commands import app

    folder = Path(case["folder"]).resolve()
    hook.folder, hook.baits, hook.makes, hook.faults = folder, tuple(case["baits"]), tuple(case["makes"]), []
    libraries, code = _libraries(), 1
    os.chdir(folder)
    with _captured((1, 2)) as texts, _limited(BYTES):
        hook.armed = True
        try:
            app(args=case["argv"], prog_name="rewrite")
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
        except BaseException as error:
            print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            hook.armed = False
    os.chdir(ROOT)
    loaded = [name for name in _libraries() - libraries if _is_strange(name, folder)]
    faults = [*dict.fromkeys(hook.faults), *(f"loaded the library {name}" for name in loaded)]
    return {"code": code, "stdout": texts[0], "stderr": texts[1], "faults": faults}


def _is_strange(library: str, folder: Path) -> bool:
    homes = (sys.prefix, sys.base_prefix, "/usr/", "/lib", "[", *(path for path in sys.path if path))
    return library.startswith(str(folder)) or not library.startswith(homes)


def _warm(folder: Path, hook: _Hook) -> None:
    import torch

    from rewrite.sources.compat import import_mended

    for library in ("timm", "transformers"):
        with contextlib.suppress(ImportError):
            import_mended(library)
    torch.save(torch.nn.Linear(2, 2), folder / "m.pt")
    for argv in (["apply", "m.pt", "-p", "dyt", "--inputs", "2x2", "-o", "m.pt2"], ["show", "m.pt2"]):
        _run({"argv": argv, "folder": str(folder), "baits": (), "makes": ()}, hook)


def _serve() -> None:
    """Answer cases from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # as the program does, around the application that is called here
    hook = _Hook()
    with tempfile.TemporaryDirectory() as folder:  # what is imported and made once, by a first run of everything
        _warm(Path(folder), hook)
    sys.addaudithook(hook)
    for line in sys.stdin.buffer:
        case = json.loads(line)
        answer = _run(case, hook) if case else {}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
