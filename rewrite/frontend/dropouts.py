"""Dropouts while tracing: one that is switched off returns its very input, and the trace must tell the two apart.

torch.export knows a value by its tensor. Where a dropout hands its input on, later uses of the input would be recorded as
uses of the dropout, and go wrong once its rate is raised. Some versions of torch copy the value, for some dropouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rewrite.graph.nodes import aten

_DROPOUTS = frozenset(
    {
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        torch.dropout,
        torch.feature_dropout,
        torch.alpha_dropout,
        torch.feature_alpha_dropout,
    }
)


class DropoutsApart(TorchFunctionMode):
    """Gives each dropout an alias of its input, a tensor of its own; ``forget_aliases`` takes it out of the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _DROPOUTS and args and isinstance(args[0], Tensor):
            args = (aten.alias.default(args[0]), *args[1:])
        elif func in _DROPOUTS and isinstance(given.get("input"), Tensor):
            given["input"] = aten.alias.default(given["input"])
        return func(*args, **given)


def forget_aliases(graph: Graph) -> None:
    """Let every use of an alias use the tensor itself."""
    for node in list(graph.nodes):
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
