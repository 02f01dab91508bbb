"""Example inputs as text, such as `input_ids=int64[2,16;0..100]`, or from a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_WORDS = {"True": True, "False": False, "None": None}
GRAMMAR = "2x3x224x224, int64[2,16], input_ids=int64[2,16;0..100], use_cache=False, or a .pt file"


LARGEST = 2**31
"""How many elements an example input may have: 8 GiB of float32."""
MOST_DIMENSIONS = 25
"""Beyond these torch's own operations begin to fail, each in its own way."""


def parse_inputs(spec: str | Sequence[str], *, seed: int = 0, model: nn.Module | None = None) -> Inputs:
    """Read `--inputs`: the name of a file, or items separated by spaces or `;`, given once or repeatedly.

        inputs = FILE.pt | item {(" " | ";") item}
        item   = [NAME "="] value
        value  = DTYPE "[" [size {"," size}] [";" values] "]"     int64[2,16;0..100]   bool[2,16]   float32[]
               | size "x" size {"x" size}                         2x3x224x224: floats of the model's dtype
               | "True" | "False" | "None" | number
        values = low ".." high (low <= value < high) | number (every value)

    Items without a name are positional and come first. Without `values`, floats are standard normal, integers lie
    in 0..10 and booleans are random; all come from a generator with this `seed`. A shape without a dtype has that of
    the `model`'s parameters, float32 without a model or in one without such.
    A file holds a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or the pair
    `(args, kwargs)`; it is read with `weights_only=True`.

    Raises:
        RewriteError: the text does not follow the grammar, asks for more than `LARGEST` elements or `MOST_DIMENSIONS`
            dimensions, or the file cannot be read.
    """
    texts = [spec] if isinstance(spec, str) else list(spec)
    if len(texts) == 1 and Path(texts[0].strip()).suffix in {".pt", ".pth"}:
        return _read_file(Path(texts[0].strip()))
    dtype = torch.float32 if model is None else Draw.like(model, seed).dtype
    draw = Draw(torch.Generator().manual_seed(seed), dtype, torch.device("cpu"))
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
        first = next(_floating(model), torch.empty(0, dtype=torch.float32))
        return cls(torch.Generator().manual_seed(seed), first.dtype, first.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def _floating(model: nn.Module) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.is_floating_point())


def unlike(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """`"; its parameters are float32, and the inputs hold float64"`, or nothing where the dtypes are no suspects."""
    own = {p.dtype for p in _floating(model)}
    given = {v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor)}
    if not own or (given and given <= own):
        return ""
    return f"; its parameters are {_dtypes(own)}, and the inputs hold {_dtypes(given) or 'no tensor'}"


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


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
        return name or None, draw.floats(*_shape(item, text.split("x"), least=1))
    if text in _WORDS:
        return name or None, _WORDS[text]
    if _is_number(text):
        return name or None, _number(item, text)
    raise RewriteError(f"--inputs: cannot read {text or item!r}; write for example {GRAMMAR}")


def _shape(item: str, sizes: Sequence[str], least: int = 0) -> list[int]:
    """The sizes of a shape, once it is known that there can be such a tensor."""
    item = _short(item)
    if len(sizes) > MOST_DIMENSIONS:
        raise RewriteError(f"--inputs: {item!r} has {len(sizes)} dimensions; at most {MOST_DIMENSIONS} are possible")
    shape = [int(size) if len(size) < 20 else LARGEST + 1 for size in sizes]
    if min(shape, default=least) < least:
        raise RewriteError(f"--inputs: {item!r} has a size of 0 and so holds no example; give sizes of 1 and more")
    if math.prod(shape) > LARGEST:
        raise RewriteError(f"--inputs: {item!r} has more than {LARGEST:,} elements, too many for an example: give less")
    return shape


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
    shape, dtype = _shape(item, parts), DTYPES[dtype_name]
    if values is None:
        integers = {torch.bool: (0, 2)}.get(dtype, (0, 10))
        return (draw.floats(*shape) if dtype.is_floating_point else draw.integers(*integers, *shape)).to(dtype)
    low, high = _range(item, values, dtype)
    if high is None:
        return torch.full(shape, low).to(dtype)
    if dtype.is_floating_point:
        unit = torch.rand(shape, generator=draw.generator, dtype=torch.float64)
        return (low + (high - low) * unit).to(dtype)
    return draw.integers(math.ceil(low), math.ceil(high), *shape).to(dtype)


def _range(item: str, values: str, dtype: torch.dtype) -> tuple[float, float | None]:
    """The bounds of a tensor's values; the second is None where all are the first."""
    low, dots, high = (part.strip() for part in values.partition(".."))
    if not _is_number(low) or (dots and not (_is_number(high) and float(low) < float(high))):
        raise RewriteError(f"--inputs: {values!r} is no range in {item!r}; write low..high or a number: 0..100")
    found = (float(low), float(high) if dots else None)
    limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(_integer(dtype)).max
    if any(abs(value) > limit for value in found if value is not None):
        raise RewriteError(f"--inputs: {values!r} in {item!r} is more than {dtype} holds: stay within {limit}")
    return found


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype is torch.bool else dtype


def _number(item: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    value = float(text)
    if not math.isfinite(value):
        raise RewriteError(f"--inputs: {_short(item)!r} is more than a number can hold")
    return value


def _short(item: str) -> str:
    return item if len(item) <= 60 else f"{item[:57]}..."


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
