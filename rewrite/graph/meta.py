"""What a node carries beside its arguments: each key with its type, who writes it, who reads it, what survives a file.

| key | what | written by | read by | in files |
| --- | --- | --- | --- | --- |
| VALUE | its FakeTensor, or containers of them, or a size | the trace, each edit | all | as sizes |
| STACK | the module calls around it, outermost first | the trace, each edit | analysis, lift, graft | yes |
| TRACE | the line of the user's code | the trace | reports | no |
| WHOLE | the layer is the whole of a module call of the user's | lift | graft | yes |
| PROVENANCE | which passes made or changed it, from which nodes | the editor | proof, reports | yes |
| CONTEXTS | the ``no_grad`` and ``autocast`` blocks around it | flatten | align, contexts; then dropped | no |
| ALIGNED | the evaluation trace has it too | capture | lift | yes |
| MODES | its arguments that differ: (in training, in evaluation) | capture | lift | yes |
| FILE_VALUE | the sizes that a file gives for it | reading a file | reading it; then dropped | no |

Copies of a graph share these values: none is changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from torch.fx import Node

T = TypeVar("T")


@dataclass(frozen=True)
class Key(Generic[T]):
    """One thing that nodes carry: its name in ``node.meta``, and what a node without it has."""

    name: str
    default: T

    def of(self, node: Node) -> T:
        """What the node carries."""
        found: T = node.meta.get(self.name, self.default)
        return self.default if found is None else found

    def set(self, node: Node, value: T) -> None:
        """Let the node carry ``value``."""
        node.meta[self.name] = value

    def drop(self, node: Node) -> T:
        """Let the node carry nothing; what it carried."""
        found: T = node.meta.pop(self.name, self.default)
        return found

    def on(self, node: Node) -> bool:
        """Whether the node carries anything."""
        return self.name in node.meta


Mark = TypedDict("Mark", {"pass": str, "from": tuple[str, ...]})
"""One edit of a node: the pass as text, and the names of the nodes that this one came from."""

VALUE: Key[Any] = Key("val", None)
STACK: Key[Mapping[str, tuple[str, Any]]] = Key("nn_module_stack", {})
TRACE: Key[str | None] = Key("stack_trace", None)
WHOLE: Key[bool] = Key("whole", False)
PROVENANCE: Key[tuple[Mark, ...]] = Key("provenance", ())
CONTEXTS: Key[tuple[Any, ...]] = Key("contexts", ())
ALIGNED: Key[bool] = Key("aligned", False)
MODES: Key[Mapping[str, tuple[Any, Any]]] = Key("modes", {})
FILE_VALUE: Key[Any] = Key("file_value", None)

PLACE: tuple[Key[Any], ...] = (STACK, TRACE)
"""Where in the user's model a node stands: what a node made beside it, or for it, takes over."""
SAVED: tuple[Key[Any], ...] = (STACK, WHOLE, PROVENANCE, MODES, ALIGNED)
"""What a file keeps; the sizes of VALUE it keeps apart."""


def inherit(node: Node, near: Node, *also: Key[Any]) -> None:
    """Let a node stand where another one stands in the user's model, and carry what ``also`` names."""
    node.meta.update(copied(near, *also))


def copied(near: Node, *also: Key[Any]) -> dict[str, Any]:
    """The place of a node, and what ``also`` names, as metadata for another one."""
    return {key.name: near.meta[key.name] for key in (*PLACE, *also) if key.name in near.meta}
