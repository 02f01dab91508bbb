"""What happened to a program: one record a pass, as text and as JSON from one source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """One place of the model that a pass changed: its module path, the kind of change and what it was."""

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Skipped:
    """One place that a pass could have changed and left alone, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """What a pass measured at one place, by name: numbers and words."""

    path: str
    figures: Mapping[str, float | str]


@dataclass(frozen=True)
class Check:
    """One thing that verification checked: what, whether it holds, the figure it rests on."""

    name: str
    passed: bool
    detail: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Verification:
    """The proof of one pass: every check by name, and the seed it drew inputs from."""

    checks: tuple[Check, ...]
    seconds: float
    seed: int

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def error(self, name: str) -> float | None:
        """The figure of the check called ``name``, None if there is none."""
        return next((c.error for c in self.checks if c.name == name), None)


@dataclass(frozen=True)
class Record:
    """What one pass did: see the fields.

    ``parameters`` counts them before and after; ``data`` is the SHA-256 of the data that the pass was given, if any.
    A pass made of passes has a record of each of its ``steps``; what they changed, skipped and proved is the whole's, too.
    """

    name: str
    text: str
    options: Mapping[str, Any]
    seconds: float
    changes: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    contract: str
    parameters: tuple[int, int]
    verification: Verification | None = None
    data: str | None = None
    steps: tuple[Record, ...] = ()
    measured: tuple[Measured, ...] = ()

    @property
    def changed(self) -> bool:
        return bool(self.changes)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return _plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The record that ``to_json`` wrote."""
        verification = data["verification"]
        proof = (
            None
            if verification is None
            else Verification(
                tuple(Check(**dict(c.items())) for c in verification["checks"]),
                verification["seconds"],
                verification["seed"],
            )
        )
        return cls(
            data["name"],
            data["text"],
            data["options"],
            data["seconds"],
            tuple(Site(**s) for s in data["changes"]),
            tuple(Skipped(**s) for s in data["skipped"]),
            tuple(data["warnings"]),
            data["contract"],
            tuple(data["parameters"]),
            proof,
            data.get("data"),
            tuple(cls.from_json(step) for step in data.get("steps", ())),
            tuple(Measured(**m) for m in data.get("measured", ())),
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
