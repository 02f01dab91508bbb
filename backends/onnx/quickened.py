"""What ONNX's exporter and optimizer do again and again, done once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from rewrite.torch_private import onnx_operators_known


@contextlib.contextmanager
def quickened() -> Iterator[frozenset[str]]:
    """An exporter and optimizer that take a part of their time on small models, and not the square of it on large ones.

    Gives the names of the operators that the exporter has a function for.
    """
    with onnx_operators_known() as known, _rules_by_kind():
        yield known


@contextlib.contextmanager
def _rules_by_kind() -> Iterator[None]:
    """Rules of several results look at nodes of the first one's kind alone: for each other they would list the graph.

    Where onnxscript has other names for it, it takes its time.
    """
    try:
        from onnxscript.rewriter import _basics, _matcher
    except ImportError:
        yield
        return
    whole = _matcher.SimplePatternMatcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, **how: Any) -> Any:
        outputs = self.pattern.output_nodes
        kind = outputs[0].op_identifier() if len(outputs) > 1 else None
        if kind is not None and kind != node.op_identifier():
            return _basics.MatchResult().fail("another kind")
        return whole(self, model, graph, node, **how)

    with mock.patch.object(_matcher.SimplePatternMatcher, "match", match):
        yield
