"""Example inputs as text, such as `input_ids=int64[2,16;0..100]`, or from a file."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError, did_you_mean, first_line

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
}
GRAMMAR = "2x3x224x224, int64[2,16], input_ids=int64[2,16;0..100], use_cache=False, or a .pt file"


def parse_inputs(spec: str | Sequence[str], *, seed: int = 0) -> Inputs:
    """Read `--inputs`: the name of a file, or items separated by spaces or `;`, given once or repeatedly.

        inputs = FILE.pt | item {(" " | ";") item}
        item   = [NAME "="] value
        value  = DTYPE "[" [size {"," size}] [";" values] "]"     int64[2,16;0..100]   bool[2,16]   float32[]
               | size "x" size {"x" size}                         2x3x224x224, the same as float32[2,3,224,224]
               | "True" | "False" | "None" | number
        values = low ".." high (low <= value < high) | number (every value)

    Items without a name are positional and come first. Without `values`, floats are standard normal, integers lie
    in 0..10 and booleans are random; all come from a generator with this `seed`.
    A file holds a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or the pair
    `(args, kwargs)`; it is read with `weights_only=True`.

    Raises:
        RewriteError: the text does not follow the grammar, or the file cannot be read.
    """
    texts = [spec] if isinstance(spec, str) else list(spec)
    if len(texts) == 1 and Path(texts[0].strip()).suffix in {".pt", ".pth"}:
        return _read_file(Path(texts[0].strip()))
    draw = Draw(torch.Generator().manual_seed(seed), torch.float32, torch.device("cpu"))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for item in (item for text in texts for item in _split(text)):
        name, value = _parse_item(item, draw)
        if name is None and kwargs:
            raise RewriteError(f"--inputs: {item!r} has no name but follows one that has; put it first or name it")
        if name is None:
            args.append(value)
        elif name in kwargs:
            raise RewriteError(f"--inputs: {name!r} is given twice")
        else:
            kwargs[name] = value
    if not args and not kwargs:
        raise RewriteError(f"--inputs is empty; write for example {GRAMMAR}")
    return tuple(args), kwargs


@dataclass(frozen=True)
class Draw:
    """Random tensors of one generator, always drawn on the CPU so that they are the same on every device."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, model: nn.Module, seed: int) -> Draw:
        floating = (p for p in model.parameters() if p.is_floating_point())
        first = next(floating, torch.empty(0, dtype=torch.float32))
        return cls(torch.Generator().manual_seed(seed), first.dtype, first.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def as_call(value: Any, origin: str) -> Inputs:
    """A tensor, a tuple of arguments, a dict of keyword arguments or the pair `(args, kwargs)` as a call."""
    if isinstance(value, Tensor):
        return (value,), {}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return (), dict(value)
    if isinstance(value, (tuple, list)):
        if len(value) == 2 and isinstance(value[0], (tuple, list)) and isinstance(value[1], dict):
            return tuple(value[0]), dict(value[1])
        return tuple(value), {}
    raise RewriteError(
        f"{origin} is a {type(value).__name__}; it must be a tensor, a tuple of arguments, "
        "a dict of keyword arguments, or the pair (args, kwargs)"
    )


def _split(text: str) -> list[str]:
    """The items of a text: separators inside brackets belong to the item."""
    return [item for item in re.split(r"[\s;]+(?![^\[\]]*\])", text) if item]


def _parse_item(item: str, draw: Draw) -> tuple[str | None, Any]:
    name, equals, text = item.rpartition("=")
    if equals and not name.isidentifier():
        raise RewriteError(f"--inputs: {name!r} is no argument name in {item!r}")
    tensor = re.fullmatch(r"(\w+)\[([^\];]*)(?:;([^\];]*))?\]", text)
    if tensor:
        return name or None, _tensor(item, tensor[1], tensor[2], tensor[3], draw)
    if re.fullmatch(r"\d+(x\d+)+", text):
        return name or None, draw.floats(*(int(n) for n in text.split("x")))
    if text in {"True", "False", "None"} or _is_number(text):
        return name or None, ast.literal_eval(text)
    raise RewriteError(f"--inputs: cannot read {text or item!r}; write for example {GRAMMAR}")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def _tensor(item: str, dtype_name: str, sizes: str, values: str | None, draw: Draw) -> Tensor:
    if dtype_name not in DTYPES:
        hint = did_you_mean(dtype_name, DTYPES) or f"; the dtypes are {', '.join(DTYPES)}"
        raise RewriteError(f"--inputs: {dtype_name!r} is no dtype in {item!r}{hint}")
    parts = [part.strip() for part in sizes.split(",")] if sizes.strip() else []
    bad = next((part for part in parts if not part.isdecimal()), None)
    if bad is not None:
        raise RewriteError(f"--inputs: {bad!r} is no size in {item!r}; sizes are whole numbers: {dtype_name}[2,16]")
    shape, dtype = [int(part) for part in parts], DTYPES[dtype_name]
    if values is None:
        integers = {torch.bool: (0, 2)}.get(dtype, (0, 10))
        return (draw.floats(*shape) if dtype.is_floating_point else draw.integers(*integers, *shape)).to(dtype)
    low, dots, high = (part.strip() for part in values.partition(".."))
    if not _is_number(low) or (dots and not (_is_number(high) and float(low) < float(high))):
        raise RewriteError(f"--inputs: {values!r} is no range in {item!r}; write low..high or a number: 0..100")
    if not dots:
        return torch.full(shape, float(low)).to(dtype)
    if dtype.is_floating_point:
        unit = torch.rand(shape, generator=draw.generator, dtype=torch.float64)
        return (float(low) + (float(high) - float(low)) * unit).to(dtype)
    return draw.integers(math.ceil(float(low)), math.ceil(float(high)), *shape).to(dtype)


def _read_file(path: Path) -> Inputs:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RewriteError(f"--inputs: there is no file {path}") from None
    except Exception as error:
        raise RewriteError(
            f"--inputs: cannot read {path}: {first_line(error)}; save tensors, tuples and dicts of them with torch.save"
        ) from None
    return as_call(value, str(path))
