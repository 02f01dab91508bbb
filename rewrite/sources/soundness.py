"""Whether a module that was rebuilt from a file is one: a damaged file may hold half of it, under any names."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rewrite.errors import RewriteError, named_line

_TABLES: tuple[tuple[str, type], ...] = (("_modules", nn.Module), ("_parameters", Tensor), ("_buffers", Tensor))


def check_sound(path: Path, module: nn.Module) -> None:
    """Raises RewriteError where the tables of a part do not hold what they should, or it cannot say what it is."""
    waiting, seen = [module], {id(module)}
    while waiting:
        part = waiting.pop()
        for table, kind in _TABLES:
            _check_table(path, part, table, kind)
        parts = [each for each in part._modules.values() if each is not None and id(each) not in seen]
        seen.update(map(id, parts))
        waiting += parts
    try:
        repr(module)  # asks every part for what it says of itself
    except Exception as error:
        raise RewriteError(f"{path} is damaged: its {type(module).__name__} has lost a part ({named_line(error)})") from None


def _check_table(path: Path, part: nn.Module, table: str, kind: type) -> None:
    entries = part.__dict__.get(table)
    sound = isinstance(entries, dict) and all(
        isinstance(name, str) and (value is None or isinstance(value, kind)) for name, value in entries.items()
    )
    if not sound:
        raise RewriteError(f"{path} is damaged: a {type(part).__name__} in it has no sound {table}")
