"""Choosing the sites of a pass by module path or by type."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from rewrite.errors import RewriteError


@dataclass(frozen=True)
class _Term:
    """One alternative of a selector: a pattern against the path, or against the names of the type."""

    pattern: re.Pattern[str]
    on_type: bool
    negative: bool

    def hits(self, path: str, types: Collection[str]) -> bool:
        return any(self.pattern.search(name) for name in (types if self.on_type else (path,)))


@dataclass(frozen=True)
class Selector:
    """Chooses layers.

    Its text is one or more terms separated by `|`:

    - `blocks.*.norm1`: a glob over the whole module path, case-sensitive; `*` crosses dots;
    - `type:LayerNorm`: a glob over any of the type's names;
    - `re:...`: a regular expression found anywhere in the path; it takes the rest of the text, `|` included;
    - `!...`: a term that must not match.

    A layer is chosen when some positive term matches it, or there is none, and no negative term does.
    Raises `RewriteError` for an empty term or a regular expression that does not compile.
    """

    text: str
    _terms: tuple[_Term, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_terms", tuple(_parse_terms(self.text)))

    def __str__(self) -> str:
        return self.text

    def matches(self, path: str, types: Collection[str] = ()) -> bool:
        """Whether the layer at this module path, whose type goes by these names, is chosen."""
        wanted = [term for term in self._terms if not term.negative]
        unwanted = [term for term in self._terms if term.negative]
        chosen = not wanted or any(term.hits(path, types) for term in wanted)
        return chosen and not any(term.hits(path, types) for term in unwanted)


def _parse_terms(text: str) -> Iterator[_Term]:
    rest: str | None = text
    while rest is not None:
        bare = rest.lstrip()
        takes_all = bare.removeprefix("!").startswith("re:")
        term, _, after = (bare, "", "") if takes_all else bare.partition("|")
        rest = after if "|" in bare and not takes_all else None
        yield _parse_term(term if takes_all else term.rstrip(), text)


def _parse_term(term: str, text: str) -> _Term:
    negative = term.startswith("!")
    body = term.removeprefix("!")
    kind, pattern = body.split(":", 1) if ":" in body else (None, body)
    if kind not in (None, "type", "re"):
        raise RewriteError(f"selector {text!r}: '{kind}:' starts no term; use a glob over paths, type: or re:")
    if not pattern or (pattern.startswith("!") and kind is None):
        raise RewriteError(f"selector {text!r} has an empty or doubly negated term; '*' selects everything")
    try:
        compiled = re.compile(pattern if kind == "re" else r"\A" + fnmatch.translate(pattern))
    except re.error as error:
        raise RewriteError(f"selector {text!r}: bad regular expression: {error}") from error
    return _Term(compiled, on_type=kind == "type", negative=negative)
