"""Files that can be read: asked before they are opened, since a pipe keeps whoever opens it waiting for ever."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

from rewrite.errors import RewriteError

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: Path) -> None:
    """Raises RewriteError unless there is a file at ``path`` with content of its own."""
    if _mode(path) is None:
        raise RewriteError(f"there is no file {path}")
    refuse_special(path)


def refuse_special(path: Path) -> None:
    """Raises RewriteError for a pipe, socket, device or folder; not where there is nothing."""
    kind = _KINDS.get(stat.S_IFMT(_mode(path) or 0))
    if kind is not None:
        raise RewriteError(f"{path} is {kind}, not a file")


def refuse_compressed(path: Path) -> None:
    """Raises RewriteError for a zip whose entries are not stored as they are: torch stores them, and others may grow."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        raise RewriteError(f"{path} is damaged or cut short, or was not written by torch.save") from None
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
        raise RewriteError(f"{path} is compressed, which torch does not do: save it again with torch.save")


def is_folder(path: Path) -> bool:
    """Whether there is a folder. Raises RewriteError for a name that no file can have."""
    return stat.S_ISDIR(_mode(path) or 0)


def is_there(path: Path) -> bool:
    """Whether there is anything. Raises RewriteError for a name that no file can have."""
    return _mode(path) is not None


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        name = str(path)
        raise RewriteError(f"cannot read {name if len(name) < 100 else f'{name[:97]}...'}: {reason}") from None
