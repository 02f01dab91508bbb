"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rewrite.errors import RewriteError, first_line

LONGEST = 255
"""How many bytes the name of a file may have, on every common file system."""


def check_place(path: Path) -> None:
    """Raises RewriteError unless ``path`` can be a file in a folder that is there."""
    if len(os.fsencode(path.name)) > LONGEST:
        raise RewriteError(f"cannot write {path.name[:40]}...: the name is too long for a file; give a shorter one by -o")
    if path.is_dir():
        raise RewriteError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise RewriteError(f"cannot write {path}: there is no folder {path.parent}")


def is_folder_name(path: Path) -> bool:
    """Whether a name is that of a folder to be written: it has no suffix (``llama-3.2-1b`` has none), or is one that is
    there.
    """
    return not path.suffix or path.suffix[1:2].isdigit() or os.path.isdir(path)


def check_folder_place(path: Path) -> None:
    """Raises RewriteError unless ``path`` can be a new folder in one that is there; an empty one may be there already."""
    if path.is_dir() and not any(path.iterdir()):
        path = path.resolve() / "x"  # its own folder is there
    elif path.is_dir():
        raise RewriteError(f"cannot write {path}: the folder is there and not empty; name a new one")
    elif path.exists():
        raise RewriteError(f"cannot write {path}: it is a file; name a folder")
    check_place(path)


class Staging:
    """Files and folders that appear all at once, when the context is left without an error; otherwise none does.

    In a ``rehearsal`` none does either: they are written to the system's temporary folder and thrown away.
    """

    def __init__(self, *, rehearsal: bool = False) -> None:
        self._rehearsal = rehearsal
        self._rooms: list[tuple[Path, Path]] = []

    def path(self, final: Path) -> Path:
        """Where to write what is to become ``final``: the same name, in a new folder beside it.

        A format of several files may write others next to it; they are moved along.
        """
        check_place(final)
        with explained(final):
            return self._room(final) / final.name

    def folder(self, final: Path) -> Path:
        """An empty folder to write what is to become the folder ``final``, which is not there or empty."""
        check_folder_place(final)
        with explained(final):
            room = self._room(final)
            (room / final.name).mkdir()
        return room / final.name

    def _room(self, final: Path) -> Path:
        folder = None if self._rehearsal else final.parent
        room = Path(tempfile.mkdtemp(prefix=f".{final.name[:100]}.", suffix=".partial", dir=folder))
        self._rooms.append((room, final))
        return room

    def drop(self, final: Path) -> None:
        """Forget what was written for ``final``."""
        for room, path in [pair for pair in self._rooms if pair[1] == final]:
            shutil.rmtree(room, ignore_errors=True)
            self._rooms.remove((room, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for room, final in self._rooms if error is None and not self._rehearsal else ():
                with explained(final):
                    for file in sorted(room.iterdir(), key=lambda each: each.name == final.name):  # itself last
                        _move(file, final.parent / file.name)
        finally:
            for room, _ in self._rooms:
                shutil.rmtree(room, ignore_errors=True)


def _move(file: Path, final: Path) -> None:
    """Move a file or folder into place, with the permissions of any written there: some writers keep others out."""
    umask = os.umask(0)
    os.umask(umask)
    if file.is_dir():
        for inner in file.rglob("*"):
            inner.chmod((0o777 if inner.is_dir() else 0o666) & ~umask)
    elif final.exists():
        shutil.copymode(final, file)
    else:
        file.chmod(0o666 & ~umask)
    os.replace(file, final)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write a file into an error for the user."""
    try:
        yield
    except OSError as error:
        staged = path.parent.suffix == ".partial"
        final = path.parent.parent / path.name if staged else path
        raise RewriteError(f"cannot write {final}: {_reason(final, error)}") from None


@contextmanager
def of_the_system() -> Iterator[None]:
    """Turn what a writer in Rust says into the operating system's error that it tells of, or into its own line."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else RewriteError(first_line(error))) from None


def _reason(path: Path, error: OSError) -> str:
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk of {path.absolute().parent} has no room for it ({said})"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"the disk or folder {path.absolute().parent} may not be written to ({said})"
    return said


class FullDiskFile:
    """A file for writers in C++, which end the process or forget the reason when a write fails.

    The first failure is kept, and what is written after it goes nowhere; leaving the context raises it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        """Write, or forget, all of the content; its length in bytes."""
        if self._error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self._error = error
        return len(content)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failed:
            self._error = self._error or failed
        if self._error is not None and (kind is None or not issubclass(kind, OSError)):
            raise self._error
