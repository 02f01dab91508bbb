"""Entry points of a group: what is installed, what a name leads to, who provides it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import RewriteError, did_you_mean

PASSES = "rewrite.passes"

BACKENDS = "rewrite.backends"

PROPERTIES = "rewrite.properties"

INSTALL = "rewrite is not installed and so has no passes: run `pip install -e .` in its folder"


def installed(group: str) -> dict[str, EntryPoint]:
    """The group's entry points by name, sorted."""
    found: dict[str, EntryPoint] = {}
    for entry_point in sorted(entry_points(group=group), key=lambda each: each.name):
        other = found.setdefault(entry_point.name, entry_point)
        if other is not entry_point:
            providers = " and ".join(sorted((provider(other), provider(entry_point))))
            raise RewriteError(f"'{entry_point.name}' in {group} is provided twice, by {providers}; uninstall one of them")
    if not found:
        raise RewriteError(INSTALL)
    return found


def announced(group: str) -> tuple[EntryPoint, ...]:
    """The group's entry points, where there may be none."""
    return tuple(entry_points(group=group))


def find(group: str, kind: str, name: str) -> EntryPoint:
    """The installed entry point of that name. Raises RewriteError, with names like it, where there is none."""
    found = installed(group)
    if name not in found:
        raise RewriteError(unknown(group, kind, name))
    return found[name]


def unknown(group: str, kind: str, name: str) -> str:
    """Words for a name that nothing installed has."""
    known = tuple(installed(group))
    return f"there is no {kind} '{name}'{did_you_mean(name, known)}; installed: {', '.join(known)}"


def provider(entry_point: EntryPoint) -> str:
    """The package that an entry point comes from."""
    dist = entry_point.dist
    package = f"{dist.name} {dist.version}" if dist else "an unknown package"
    return f"{package} ({entry_point.value})"


def load(entry_point: EntryPoint, kind: str) -> Any:
    """What an entry point names. Raises RewriteError, with its package, where it cannot be imported."""
    try:
        return entry_point.load()
    except (ImportError, AttributeError) as error:
        raise RewriteError(
            f"{kind} '{entry_point.name}' from {provider(entry_point)} cannot be imported: {error}"
        ) from error


def announced_layers(kinds: Collection[type]) -> set[type]:
    """Those of these classes that an installed pass says it puts in (`Pass.inserts`).

    Only passes of the packages that the classes come from are imported: for a model of no package with passes, none is.
    """
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    return {*kinds} & {kind for package in packages for kind in _inserted(package)}


def _inserted(package: str) -> Iterator[type]:
    """The layer classes of all passes of a package; a pass that cannot be imported has put nothing into a model."""
    for entry_point in announced(PASSES):
        if entry_point.module.partition(".")[0] == package:
            try:
                yield from getattr(load(entry_point, "pass"), "inserts", ())
            except RewriteError:
                continue
