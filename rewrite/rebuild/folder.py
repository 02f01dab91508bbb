"""A model of the user's class with a program's sizes and values, as a folder that its own library reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rewrite.errors import RewriteError, named_line
from rewrite.graph.program import Program
from rewrite.lowering.compared import disagreement
from rewrite.sources.compat import import_mended
from rewrite.sources.models import quiet
from rewrite.sources.noted import FORMAT, NOTE, WEIGHTS

from .fit import Fitted, fit_class
from .makers import ByClass, ByConfig, ByName

_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe")
_OWN = ("config.json", "generation_config.json", NOTE)
_LARGEST = 1 << 28


def write_class(program: Program, folder: Path, name: str) -> str:
    """Write the program's own class with its sizes and values into ``folder``, which is there and empty, read it back by
    its own library and compare it with the program, in both modes; how it is read, in words. ``name`` is what the folder
    will be called.

    Raises RewriteError, with the reason, where the class has no such settings, or is not what the program is.
    """
    if program.properties:
        raise RewriteError(f"it runs under {', '.join(program.properties)}, which no configuration can say")
    fitted = fit_class(program)
    made = fitted.module(program)
    maker = fitted.maker
    if isinstance(maker, ByConfig):
        words = _write_pretrained(maker, made, folder)
        loaded = _read_pretrained(maker, folder)
        copy_texts(fitted, folder)
    else:
        words = _write_note(fitted, maker, made, folder, name)
        loaded = _read_note(fitted, maker, folder, made)
    difference = disagreement(program, loaded.train(program.module.training), fitted.closed.name)
    if difference:
        raise RewriteError(f"read back by its own class, it differs {difference}")
    return words


# ---- transformers


def _write_pretrained(maker: ByConfig, made: nn.Module, folder: Path) -> str:
    writer: Any = made
    with quiet(import_mended("transformers")):
        try:
            writer.save_pretrained(folder)
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # a library may allow less in a file than in memory
            raise RewriteError(f"{type(maker.config).__name__} does not allow it: {_whole(error)}") from error
    return f"a transformers folder, read it with {maker.kind.__name__}.from_pretrained"


def _read_pretrained(maker: ByConfig, folder: Path) -> nn.Module:
    kind: Any = maker.kind
    with quiet(import_mended("transformers")):
        try:
            loaded, info = kind.from_pretrained(folder, local_files_only=True, dtype="auto", output_loading_info=True)
        except Exception as error:  # whatever the library says of the folder that it has just written
            raise RewriteError(f"its own class cannot read it back: {named_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise RewriteError(
                f"read back by its own class, it has {what.replace('_', ' ')}: {sorted(map(str, info[what]))[0]}"
            )
    found: nn.Module = loaded
    return found


def copy_texts(fitted: Fitted, folder: Path) -> None:
    """Copy the tokenizer's and the processor's files along, unless the vocabulary or the image is of another size now."""
    if any(word in str(path[-1]) for path in fitted.edits for word in ("vocab", "image_size")):
        return
    source = Path(str(getattr(getattr(fitted.maker, "config", None), "name_or_path", "") or ""))
    if not source.name or not source.is_dir():
        return
    for file in sorted(source.iterdir()):
        own = file.name in _OWN or file.name.endswith(".index.json") or (folder / file.name).exists()
        if file.suffix in _TEXTS and not own and file.is_file() and file.stat().st_size <= _LARGEST:
            shutil.copyfile(file, folder / file.name)


def _whole(error: Exception) -> str:
    """What an error says, on one line: the reason may stand in the second."""
    return " ".join(str(error).split())[:300]


# ---- by name or constructor


def _write_note(fitted: Fitted, maker: ByName | ByClass, made: nn.Module, folder: Path, name: str) -> str:
    from safetensors.torch import save_model

    save_model(made, str(folder / WEIGHTS))
    arguments = maker.arguments(fitted.edits)
    target = f"timm:{maker.name}" if isinstance(maker, ByName) else f"{maker.kind.__module__}:{maker.kind.__qualname__}"
    line = _line(maker, arguments, made, f"{name}/{WEIGHTS}")
    note = {"format": FORMAT, "model": target, "arguments": _as_json(arguments), "python": line}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return f"{maker.kind.__name__}; in Python: {line}"


def _line(maker: ByName | ByClass, arguments: Mapping[str, Any], made: nn.Module, weights: str) -> str:
    """A line of Python that builds the model and loads its weights."""
    if isinstance(maker, ByName):
        imports = "import timm, torch"
        call = f"timm.create_model({', '.join([repr(maker.name), *_keywords(arguments)])})"
    else:
        homes: dict[str, dict[str, None]] = {}
        for kind in (maker.kind, *_records(arguments)):
            homes.setdefault(kind.__module__, {}).setdefault(kind.__qualname__.partition(".")[0])
        imports = "; ".join(["import torch", *(f"from {home} import {', '.join(names)}" for home, names in homes.items())])
        call = f"{maker.kind.__qualname__}({', '.join(_keywords(arguments))})"
    dtype = _dtype(made)
    cast = "" if dtype is torch.float32 else f".to({dtype})"
    return f"{imports}; from safetensors.torch import load_model; model = {call}{cast}; load_model(model, {weights!r})"


def _keywords(arguments: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_source(value)}" for key, value in arguments.items()]


def _source(value: Any) -> str:
    """A value as Python. Raises RewriteError for an object that no expression gives."""
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_source, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {_source(v)}' for k, v in value.items())}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}({', '.join(_keywords(_fields(value)))})"
    if isinstance(value, SimpleNamespace):
        return f"SimpleNamespace({', '.join(_keywords(vars(value)))})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise RewriteError(f"its constructor takes a {type(value).__name__}, of which no text can be made")


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}


def _as_json(value: Any) -> Any:
    """Arguments as JSON; a record as its class and what it holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "arguments": _as_json(_fields(value))}
    if isinstance(value, SimpleNamespace):
        return {"class": "types:SimpleNamespace", "arguments": _as_json(vars(value))}
    if isinstance(value, Mapping):
        return {str(key): _as_json(held) for key, held in value.items()}
    return [_as_json(held) for held in value] if isinstance(value, list | tuple) else value


def _records(value: Any) -> Iterator[type]:
    """The classes of the records among arguments."""
    if isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        yield type(value)
        value = vars(value) if isinstance(value, SimpleNamespace) else _fields(value)
    for held in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _records(held)


def _read_note(fitted: Fitted, maker: ByName | ByClass, folder: Path, made: nn.Module) -> nn.Module:
    """The model as the line of Python makes it."""
    from safetensors.torch import load_model

    try:
        model = maker.build(fitted.edits).to(_dtype(made))
        load_model(model, str(folder / WEIGHTS))
    except Exception as error:  # whatever the class says of these arguments
        raise RewriteError(f"its own class cannot read it back: {named_line(error)}") from error
    return model


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
