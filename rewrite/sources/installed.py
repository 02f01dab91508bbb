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
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch


@dataclass(frozen=True)
class Installed:
    """Where installers put packages, and the sources of those that are installed as editable, with what they are of.

    ``folders`` holds for each folder the packages in it that count, None where all do: beside the package of an editable
    installation lie its tests and scripts, which are not installed.
    """

    folders: tuple[tuple[Path, frozenset[str] | None], ...]

    @classmethod
    def here(cls) -> Installed:
        paths = sysconfig.get_paths()
        folders = {paths["purelib"], paths["platlib"], *site.getsitepackages()}
        folders |= {site.getusersitepackages()} if site.ENABLE_USER_SITE else set()
        places = (folder for text in folders for folder in (Path(text).absolute(), Path(text).resolve()))
        found: list[tuple[Path, frozenset[str] | None]] = [(folder, None) for folder in places]
        for distribution in metadata.distributions(path=sorted(folders)):
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            if origin.get("dir_info", {}).get("editable"):
                names = frozenset((distribution.read_text("top_level.txt") or "").split())
                found.append((Path(unquote(urlparse(origin["url"]).path)).resolve(), names or None))
        return cls((*found, (Path(torch.__file__).parent, None)))

    def holds(self, module: str) -> bool:
        """Whether a module belongs to an installed package, so that importing it runs nothing from the current folder."""
        return self._source(module) is not None

    def defines(self, module: str, name: str) -> bool:
        """Whether the source of an installed module has a class of this name. Nothing is imported to see."""
        return self._mentions(module, rf"^\s*class\s+{re.escape(name)}\b")

    def registers(self, module: str, operator: str) -> bool:
        """Whether the source of an installed module names the operator ``namespace::name``, or its namespace."""
        namespace = operator.partition("::")[0]
        return self._mentions(module, rf"""["']{re.escape(namespace)}(::|["'])""")

    def _mentions(self, module: str, pattern: str) -> bool:
        source = self._source(module)
        if source is None:
            return False
        return re.search(pattern, source.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None

    def _source(self, module: str) -> Path | None:
        """The Python file that importing a module runs, if it lies where packages are installed."""
        if not all(part.isidentifier() for part in module.split(".")) or "__main__" in module.split("."):
            return None
        source = _find_source(module)
        spellings = (source, source.resolve()) if source else ()
        top = module.partition(".")[0]
        homes = [folder for folder, names in self.folders if names is None or top in names]
        return source if any(path.is_relative_to(home) for path in spellings for home in homes) else None


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
