"""What counts as installed: where a module would be loaded from, judged before anything is imported."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from .pickle_scan import Global


def is_installed(module: str) -> bool:
    """Whether a module belongs to an installed package, so that importing it runs nothing from the current folder."""
    top = module.partition(".")[0]
    spec = find_spec(top) if top and top != "__main__" else None
    return spec is not None and spec.origin is not None and "site-packages" in spec.origin


@dataclass(frozen=True)
class _Installed:
    """Where installers put packages, and the sources of those that are installed as editable."""

    folders: tuple[Path, ...]

    @classmethod
    def here(cls) -> _Installed:
        paths = sysconfig.get_paths()
        folders = {paths["purelib"], paths["platlib"], *site.getsitepackages()}
        folders |= {site.getusersitepackages()} if site.ENABLE_USER_SITE else set()
        found = [folder for text in folders for folder in (Path(text).absolute(), Path(text).resolve())]
        for distribution in metadata.distributions(path=sorted(folders)):
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            if origin.get("dir_info", {}).get("editable"):
                found.append(Path(unquote(urlparse(origin["url"]).path)).resolve())
        return cls((*found, Path(torch.__file__).parent))

    def defines(self, name: Global) -> bool:
        """Whether the source of an installed package has a class of this name. Nothing is imported to see."""
        source = _find_source(name.module)
        if source is None:
            return False
        spellings = (source, source.resolve())
        if not any(path.is_relative_to(folder) for path in spellings for folder in self.folders):
            return False
        text = source.read_text(encoding="utf-8", errors="replace")
        return re.search(rf"^\s*class\s+{name.name}\b", text, re.MULTILINE) is not None


def _find_source(module: str) -> Path | None:
    """The file that importing `module` runs, or ran."""
    if module in sys.modules:
        origin = getattr(sys.modules[module], "__file__", None)
    else:
        spec = _find_spec(module)
        origin = spec.origin if spec else None
    return Path(origin).absolute() if origin and origin.endswith(".py") else None


def _find_spec(module: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, which would import the packages that hold the module."""
    package, _, _ = module.rpartition(".")
    if not package:
        try:
            return importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
    if package in sys.modules:
        return _first_spec(module, list(getattr(sys.modules[package], "__path__", ())))
    holder = _find_spec(package)
    return _first_spec(module, list(holder.submodule_search_locations or ())) if holder else None


def _first_spec(module: str, path: list[str]) -> ModuleSpec | None:
    """What the first finder says: editable installations map packages by finders of their own."""
    for finder in sys.meta_path:
        found = finder.find_spec(module, path) if hasattr(finder, "find_spec") else None
        if found is not None:
            return found
    return None
