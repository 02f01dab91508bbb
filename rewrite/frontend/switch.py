"""Where training and evaluation differ: each chunk of an alignment becomes a region with a subgraph for each mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.carve import carve, free_inputs, replace_with_call
from rewrite.graph.nodes import aten, leaves, map_leaves, module_stack
from rewrite.graph.ops import FOLLOWING
from rewrite.graph.regions import Region

from .align import Alignment, Chunk
from .casts import cast_chain, is_idle, is_symbolic
from .contexts import grouped

Place = Callable[[Sequence[Node], str, nn.Module], str]


def switch_modes(train: Graph, evaluation: Graph, alignment: Alignment, place: Place) -> None:
    """Edit ``train`` in place: each chunk becomes a call of a region that holds the subgraphs of both modes."""
    inverse: dict[Node, Node] = {}
    for ours, theirs in alignment.partner.items():
        if not is_idle(ours) or theirs not in inverse:
            inverse[theirs] = ours
    ours_by_name = {(n.op, n.target): n for n in train.nodes if n.op in ("placeholder", "get_attr")}
    builder = _Builder(train, evaluation, inverse, ours_by_name, place)
    for chunk in alignment.chunks:
        builder.build(chunk)


class _Builder:
    def __init__(
        self,
        train: Graph,
        evaluation: Graph,
        inverse: dict[Node, Node],
        ours_by_name: dict[tuple[str, Any], Node],
        place: Place,
    ) -> None:
        self.train, self.evaluation = train, evaluation
        self.inverse, self.ours_by_name, self.place = inverse, ours_by_name, place
        self.order = _Order(train)
        self.their_place = {n: i for i, n in enumerate(evaluation.nodes)}

    def build(self, chunk: Chunk) -> None:
        taken = self._with_helpers(chunk.first)
        outputs = [x for x, _ in chunk.switches]
        theirs = [y for _, y in chunk.switches]
        body = self._their_nodes(chunk.second, theirs)
        external = {n: self._ours(n) for n in free_inputs(body, theirs)}
        inputs = list(dict.fromkeys([*free_inputs(taken, outputs), *external.values()]))
        position = self._position(chunk, taken, inputs)
        if any(self.order.of(user) < self.order.of(position) for user, _, _ in chunk.uses):
            self._raise_sizes(inputs)
            position = self._position(chunk, taken, inputs)
        layers: dict[str, nn.Module] = {}
        train = grouped(carve(taken, outputs, inputs), layers, 0)
        evaluation = grouped(carve(body, theirs, inputs, rename=lambda n: external[n]), layers, 0)
        region = Region({"train": train, "eval": evaluation}, "training and evaluation differ", layers=layers)
        path = self.place(taken or [position], "branch", region)
        meta = _common_meta(taken or [position])
        nodes = [
            o if isinstance(o, Node) else (y if isinstance(y, Node) else None) for o, y in zip(outputs, theirs, strict=True)
        ]
        made = replace_with_call(self.train, path, inputs, nodes, position, meta)
        self.order.number_before(position)
        for other, node in zip(theirs, made, strict=True):
            if isinstance(other, Node):
                self.inverse.setdefault(other, node)
        self._rewire(chunk, made)
        for node in reversed(taken):
            if not node.users:
                self.train.erase_node(node)

    def _with_helpers(self, nodes: Sequence[Node]) -> list[Node]:
        """A chunk's nodes with the casts, sizes and dtypes between them, in graph order."""
        inside, todo = set(nodes), list(nodes)
        while todo:
            for source in todo.pop().all_input_nodes:
                if _is_helper(source) and source not in inside and all(u in inside for u in source.users):
                    inside.add(source)
                    todo.append(source)
        return sorted(inside, key=self.order.of)

    def _their_nodes(self, nodes: Sequence[Node], results: Sequence[Any]) -> list[Node]:
        """The other graph's nodes of a chunk, with the casts, sizes and dtypes they need."""
        wanted = set(nodes)
        todo = [*nodes, *(r for r in results if isinstance(r, Node))]
        while todo:
            node = todo.pop()
            if node not in wanted and _is_helper(node):
                wanted.add(node)
            if node in wanted:
                todo += [
                    n for n in node.all_input_nodes if n not in wanted and n not in self.inverse and n.op == "call_function"
                ]
        return sorted(wanted, key=self.their_place.__getitem__)

    def _ours(self, theirs: Node) -> Node:
        if theirs in self.inverse:
            return self.inverse[theirs]
        if theirs.op in ("placeholder", "get_attr"):
            known = self.ours_by_name.get((theirs.op, theirs.target))
            if known is None:
                first = next(iter(self.train.nodes))
                with self.train.inserting_before(first):
                    known = self.train.get_attr(str(theirs.target))
                self.order.number_before(first)
                known.meta = dict(theirs.meta)
                self.ours_by_name[(theirs.op, theirs.target)] = known
            return known
        if is_idle(theirs):
            return self._ours(cast_chain(theirs.args[0])[0])
        raise AssertionError(f"{theirs.name} has no counterpart")

    def _position(self, chunk: Chunk, taken: Sequence[Node], inputs: Sequence[Node]) -> Node:
        """The first node that may follow the region: behind all its inputs, before its first use."""
        inside = set(taken)
        behind = [*inputs, *taken]
        node: Node = max(behind, key=self.order.of).next if behind else next(iter(self.train.nodes))
        while node in inside or node.op in ("placeholder", "get_attr"):
            node = node.next
        return node

    def _raise_sizes(self, nodes: Sequence[Node]) -> None:
        """Move sizes right behind what they are computed from: a chunk may take a late one, and give values used before."""
        for node in sorted((n for n in nodes if is_symbolic(n)), key=self.order.of):
            place = max(node.all_input_nodes, key=self.order.of).next
            while place.op in ("placeholder", "get_attr"):
                place = place.next
            if place is not node:
                place.prepend(node)
                self.order.moved(node)

    def _rewire(self, chunk: Chunk, made: Sequence[Node]) -> None:
        """Give each user of a switched value the region's output, keeping real casts in between."""
        by_user: dict[Node, dict[int, Node]] = {}
        for user, place, switch in chunk.uses:
            by_user.setdefault(user, {})[place] = made[switch]
        for user, places in by_user.items():
            current = list(leaves(user.args)) + list(leaves(dict(user.kwargs)))
            for place in [p for p in places if p < len(current)]:
                places[place] = self._recast(current[place], places[place], user)
            missing = [places[p] for p in sorted(places) if p >= len(current)]
            count = iter(range(len(current)))

            def renewed(leaf: Any, count: Any = count, places: dict[int, Node] = places) -> Any:
                place = next(count)
                return places.get(place, leaf)

            user.args = map_leaves(user.args, renewed)
            user.kwargs = map_leaves(dict(user.kwargs), renewed)
            if missing:
                results = user.args[0]  # only the output node can have fewer leaves than its partner
                assert isinstance(results, tuple | list)
                user.args = ((*results, *missing),)

    def _recast(self, old: Any, new: Node, user: Node) -> Node:
        for dtype in cast_chain(old)[1]:
            with self.train.inserting_before(user):
                cast = self.train.call_function(aten.to.dtype, (new, dtype))
            cast.meta = dict(old.meta)
            self.order.number_before(user)
            new = cast
        return new


def _is_helper(node: Node) -> bool:
    """Whether a node takes no part in the matching: each graph has its own."""
    return is_symbolic(node) or node.target in FOLLOWING or cast_chain(node)[0] is not node


class _Order:
    """The order of a graph's nodes, kept as nodes are inserted: each has a number, a new one one between its neighbours'."""

    def __init__(self, graph: Graph) -> None:
        self._number = {n: Fraction(i) for i, n in enumerate(graph.nodes)}

    def of(self, node: Node) -> Fraction:
        """The number of a node."""
        return self._number[node]

    def moved(self, node: Node) -> None:
        """Give a node that stands elsewhere now its number."""
        del self._number[node]
        self.number_before(node.next)

    def number_before(self, node: Node) -> None:
        """Give the new nodes right before one their numbers."""
        new = []
        while node.prev not in self._number and node.prev.op != "root":
            node = node.prev
            new.append(node)
        if not new:
            return
        after = self._number[new[0].next]
        before = self._number.get(node.prev, after - 1)  # nothing stands before the first
        for place, made in enumerate(reversed(new), 1):
            self._number[made] = before + (after - before) * place / (len(new) + 1)


def _common_meta(nodes: Sequence[Node]) -> dict[str, Any]:
    """The metadata of a region: the module calls that all its nodes share."""
    stacks = [module_stack(n) for n in nodes]
    shared = 0
    while all(len(s) > shared for s in stacks) and len({s[shared][0] for s in stacks}) == 1:
        shared += 1
    whole = dict(nodes[0].meta.get("nn_module_stack") or {})
    return {"nn_module_stack": dict(list(whole.items())[:shared])}


def needs_other_graph(alignment: Alignment) -> bool:
    """Whether some chunk has nodes of the second graph, so that it must be in the first one's dtype."""
    return any(not is_idle(n) for chunk in alignment.chunks for n in chunk.second)
