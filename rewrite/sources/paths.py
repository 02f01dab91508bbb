"""Files that can be read: asked before they are opened, since a pipe keeps whoever opens it waiting for ever."""

from __future__ import annotations

import os
import stat
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
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise RewriteError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RewriteError(f"cannot read {str(path)[:200]}: {reason}") from None
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is not None:
        raise RewriteError(f"{path} is {kind}, not a file")
