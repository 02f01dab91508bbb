"""Rules: a pattern, a check with its reason, a rewrite; applied until nothing matches."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from torch.fx import Node

from rewrite.graph.program import Program

if TYPE_CHECKING:
    from .context import Context
from rewrite.analysis.match import Match, Pattern, find, matches, path_of


class Rule(abc.ABC):
    """One rewrite: where ``pattern`` matches and ``check`` has no objection, ``rewrite`` edits."""

    pattern: Pattern

    def check(self, match: Match, program: Program) -> str | None:
        """Why this match must be left alone, or None."""
        return None

    @abc.abstractmethod
    def rewrite(self, match: Match, program: Program, context: Context) -> None:
        """Edit the program at a match, through ``context.edit``."""


def apply_rules(program: Program, context: Context, *rules: Rule) -> int:
    """Apply each rule at each of its matches, once; failed checks are noted as skipped. The number of rewrites."""
    return sum(_apply_rule(program, context, rule) for rule in rules)


def _apply_rule(program: Program, context: Context, rule: Rule) -> int:
    """Rounds of matching: a match whose values an earlier rewrite of the round changed waits for the next one."""
    done = 0
    matches = list(find(program, rule.pattern))
    while matches:
        used: set[Node] = set()
        waiting: set[Node] = set()
        for match in matches:
            if used.intersection(match.nodes):
                continue
            if not _holds(match, rule.pattern, program):
                waiting.add(match.root)
                used.update(match.nodes)
                continue
            reason = rule.check(match, program)
            if reason is not None:
                context.skip(path_of(match.root), reason)
                continue
            used.update(match.nodes)
            rule.rewrite(match, program, context)
            done += 1
        matches = [m for m in find(program, rule.pattern) if m.root in waiting] if waiting else []
    return done


def _holds(match: Match, pattern: Pattern, program: Program) -> bool:
    """Whether a match found earlier is still there, with the same values."""
    now = Match(match.root)
    return (
        matches(pattern, match.root, now, program, root=True)
        and set(now.nodes) == set(match.nodes)
        and all(value is match.values[name] for name, value in now.values.items())
    )
