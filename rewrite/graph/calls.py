"""Who calls which layer, and reads which tensor, in a graph that is being edited."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node


class Calls:
    """The calls of each path in a graph, and the reads of tensors, in execution order, kept up to date by the edits."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._count = -1
        self._of: dict[str, dict[Node, None]] = {}
        self._reads: dict[str, dict[Node, None]] = {}

    def of(self, path: str) -> list[Node]:
        """The nodes that call ``path``."""
        self._see()
        return [n for n in self._of.get(path, ()) if n.target == path]

    def reads_below(self, path: str) -> list[Node]:
        """The nodes that read a tensor of the module at ``path``, or of one in it."""
        self._see()
        return [n for n in self._reads.get(path, ()) if str(n.target).startswith(f"{path}.")]

    def add(self, node: Node) -> None:
        """A node came."""
        self._count += 1
        self._take(node)

    def drop(self, node: Node) -> None:
        """A node is about to go."""
        self._count -= 1
        self._leave(node)

    def move(self, node: Node, path: str) -> None:
        """Let a node call, or read, another path."""
        self._leave(node)
        node.target = path
        self._take(node)

    def below(self, path: str) -> bool:
        """Whether a node calls ``path`` or a layer below it."""
        self._see()
        return any(p == path or p.startswith(f"{path}.") for p, nodes in self._of.items() if nodes)

    def _see(self) -> None:
        if self._count == len(self._graph.nodes):
            return
        self._count = len(self._graph.nodes)  # nodes came or went past the editor
        self._of, self._reads = {}, {}
        for node in self._graph.nodes:
            self._take(node)

    def _take(self, node: Node) -> None:
        for held, path in self._homes(node):
            held.setdefault(path, {})[node] = None

    def _leave(self, node: Node) -> None:
        for held, path in self._homes(node):
            held.get(path, {}).pop(node, None)

    def _homes(self, node: Node) -> Iterator[tuple[dict[str, dict[Node, None]], str]]:
        """Where a node is noted: a call under its path, a read under each module around the tensor."""
        if node.op == "call_module":
            yield self._of, str(node.target)
        elif node.op == "get_attr":
            parts = str(node.target).split(".")
            yield from ((self._reads, ".".join(parts[:i])) for i in range(1, len(parts)))
