"""Reading a `.pt` file that holds a whole `nn.Module`, without running what a stranger put into it.

Two walls stand before the object. The first (`pickle_scan`, `pickle_vet`) reads the opcodes as data and
judges every name in them; the second is torch's own `weights_only` unpickler, which is allowed exactly what
passed.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rewrite.errors import RewriteError, named_line
from rewrite.torch_private import PyTorchFileReader

from .compat import mended
from .paths import refuse_compressed, refuse_special
from .pickle_scan import Scan, UnreadableError, scan
from .pickle_vet import REBUILD, TYPED, Allowed, RefusedError, vet

TRUST = "if you trust where it comes from, --trust-pickle reads it and runs what it holds"
_ZIP, _BEFORE_ZIP = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


def load_module(path: Path, *, trust: bool = False) -> nn.Module:
    """The module that `torch.save(module, path)` wrote, on the CPU.

    Args:
        path: the file.
        trust: unpickle whatever the file holds, with the current folder importable. Runs the file's code.

    Raises:
        RewriteError: the file cannot be read, holds no module, or asks for more than a safe load allows.
    """
    if _is_zip(path):
        _check_archive(path)
    elif not trust:
        raise RewriteError(f"{path} has torch's format before 1.6: load it and save it again, or {TRUST}")
    if trust:
        with current_folder_importable():
            return _expect_module(path, _unpickle(path, weights_only=False))
    return _expect_module(path, _unpickle(path, _vetted(path)))


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Import from the current folder first, as `python -m` does, while the context lasts."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _is_zip(path: Path) -> bool:
    refuse_special(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise RewriteError(f"there is no file {path}") from None
    except OSError as error:
        raise RewriteError(f"cannot read {path}: {error.strerror or error}") from None
    if not head:
        raise RewriteError(f"{path} is empty")
    if not head.startswith((_ZIP, _BEFORE_ZIP)):
        raise RewriteError(f"{path} is not a file saved by torch.save")
    return head.startswith(_ZIP)


def _check_archive(path: Path) -> None:
    """Tell apart the archives that torch writes: only one of them is a pickled object."""
    try:
        records = PyTorchFileReader(str(path)).get_all_records()
    except Exception:  # whatever torch's native reader throws: at names that are no text, numbers beyond any size
        raise RewriteError(f"{path} is damaged or cut short, or was not written by torch.save") from None
    names = {name.removeprefix("archive/") for name in records}
    if "constants.pkl" in names:
        raise RewriteError(f"{path} is a TorchScript archive: save the Python module that it was made from")
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names):
        raise RewriteError(f"{path} holds an exported program: rename it to {path.with_suffix('.pt2').name}")
    if "data.pkl" not in names:
        raise RewriteError(f"{path} is a zip archive that was not written by torch.save")
    refuse_compressed(path)


def _vetted(path: Path) -> Sequence[Allowed]:
    """What the file's pickle may have, with the names it uses. Nothing of the file runs."""
    try:
        # Read as torch.load will: another zip reader may find another record of this name.
        found = scan(PyTorchFileReader(str(path)).get_record("data.pkl"))
        unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if not unsafe <= {name.path for name in found.names}:
            raise UnreadableError("its pickle spells a name as torch.save does not")
    except UnreadableError as error:
        raise RewriteError(f"{path} cannot be read safely: {error}; {TRUST}") from None
    except Exception:
        raise RewriteError(f"{path} is damaged or cut short: its pickle cannot be read") from None
    _check_root(path, found)
    for name in found.names:
        if name.module == "__main__":
            raise _of_a_script(path, name.name)
    try:
        return vet(found, unsafe)
    except RefusedError as refusal:
        raise RewriteError(f"{path} was not read, since its pickle {refusal}; {TRUST}") from None
    except RewriteError as error:
        raise RewriteError(f"{path} {error}") from None


def _check_root(path: Path, found: Scan) -> None:
    """The common mistakes, such as a checkpoint in place of a module, are answered before anything else."""
    root = found.root
    if getattr(root, "is_mapping", False):
        keys = [key for key in root.entries[::2] if isinstance(key, str)]
        raise _no_module(path, f"dict with the keys {', '.join(keys[:3])}, ..." if keys else "dict")
    callee = getattr(root, "callee", "")
    if callee.startswith("torch.fx."):
        raise RewriteError(
            f"{path} holds a GraphModule, and unpickling one traces its code again, which can change it: "
            "save it as .pt2 by torch.export, or save the module that it was made from"
        )
    if callee in REBUILD | {TYPED}:
        raise _no_module(path, "tensor")
    if getattr(root, "kind", "") not in ("call", "new"):
        raise _no_module(path, getattr(root, "kind", type(root).__name__))


def _unpickle(path: Path, allowed: Sequence[Allowed] = (), *, weights_only: bool = True) -> object:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*allowed]):
            warnings.simplefilter("ignore")
            load = partial(torch.load, path, map_location="cpu", weights_only=weights_only)
            return load() if weights_only else mended(load)
    except Exception as error:
        script_class = re.search(r"attribute '(\w+)' on <module '[^']*__main__'", str(error))
        if script_class:
            raise _of_a_script(path, script_class[1]) from None
        raise RewriteError(f"cannot rebuild the module in {path}: {named_line(error)}") from None


def _expect_module(path: Path, value: object) -> nn.Module:
    if isinstance(value, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        raise RewriteError(f"{path} holds a {type(value).__name__}: save the module that it was made from")
    if not isinstance(value, nn.Module):
        raise _no_module(path, type(value).__name__)
    return value


def _no_module(path: Path, what: str) -> RewriteError:
    return RewriteError(
        f"{path} holds a {what}, not a module; if these are weights, name their model: "
        f"timm:NAME, a transformers folder or package.module:factory, with --weights {path}"
    )


def _of_a_script(path: Path, name: str) -> RewriteError:
    return RewriteError(
        f"{path} holds __main__.{name}, a class of the script that saved it: move {name} to a module of its own, "
        f"import it in the script, save again, and read it with --trust-pickle in that folder; "
        f"or give package.module:factory, with the state_dict as --weights"
    )
