"""The self-check of the analysis: every dimension at a prime of its own, at once, and all shapes inferred anew."""

from __future__ import annotations

from collections.abc import Sequence

from rewrite.errors import RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.program import Program

from .analyze import analyze
from .dims import Dim
from .resize import resize
from .table import Table


def primes(table: Table) -> dict[Dim, list[int]]:
    """For each resizable dimension a vector of a prime length of its own above its size, twice a prime where it is even."""
    taken: set[int] = set()
    found = {}
    for dim in table.resizable.values():
        each = 2 if "even" in dim.uses else 1
        size = next(n for n in range(dim.size + 1, 10**9) if n not in taken and n % each == 0 and _is_prime(n // each))
        taken.add(size)
        found[dim] = [*range(dim.size), *[-1] * (size - dim.size)]
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


def check(edit: Editor) -> int:
    """Set every resizable dimension of a program to a prime of its own and infer all values anew; how many there were.

    It finds every missed tie, number and offset at once. Raises RewriteError for the first value that does not fit, with the
    dimensions at fault.
    """
    names = list(analyze(edit.program).resizable)
    given = edit.program.clone(share=True)
    try:
        _set(edit, names)
    except RewriteError as error:
        raise RewriteError(f"{', '.join(_at_fault(given, names))}: {error}") from error
    return len(names)


def _set(edit: Editor, names: Sequence[str]) -> None:
    """Set some dimensions to primes."""
    table = analyze(edit.program)
    chosen = primes(table)
    resize(edit, table, {table.named[name]: chosen[table.named[name]] for name in names}, hollow=True)
    edit.follow()
    edit.revalue()


def _at_fault(program: Program, names: Sequence[str]) -> Sequence[str]:
    """The few dimensions that do not fit at primes, by halving; all that are left where it takes them together."""
    middle = len(names) // 2
    for half in (names[:middle], names[middle:]) if middle else ():
        try:
            _set(Editor(program.clone(share=True), "check"), half)
        except RewriteError:
            return _at_fault(program, half)
    return names
