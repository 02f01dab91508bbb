"""Running the Python of a Markdown page as a reader would, and holding what it prints against the page."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_python(page: Path) -> None:
    """Run the page's Python blocks one after the other; comments of their own line after a `print` are its output."""
    home = ModuleType("page")  # dataclasses look up the module of a class
    sys.modules["page"] = home
    try:
        for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block, str(page), "exec"), home.__dict__)
            assert _lines(printed.getvalue()) == _promised(block), f"{page.name}: it prints something else"
    finally:
        del sys.modules["page"]


def _promised(block: str) -> list[str]:
    return [line.removeprefix("# ").rstrip() for line in block.splitlines() if line.startswith("# ")]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]
