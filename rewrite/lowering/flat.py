"""A program as formats see it: tensors in, tensors out, each with a name, and inputs of other sizes to try it on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from rewrite.graph.interface import Argument, Interface
from rewrite.numerics.sizes import resized
from rewrite.torch_private import pytree

from .inference import evaluated

if TYPE_CHECKING:
    from rewrite.graph.program import Dimension, LayerGraph, Program


@dataclass(frozen=True)
class Leaf:
    """One leaf of the model's output: the flat output at ``place``, a number if it is one, or always ``value``."""

    place: int | None
    value: Any = None
    is_number: bool = False

    def of(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The leaf, from the flat outputs."""
        if self.place is None:
            return self.value
        return tensors[self.place].item() if self.is_number else tensors[self.place]


@dataclass(frozen=True)
class Flat:
    """A copy of a program on the CPU, in evaluation mode, whose module maps tensors to a tuple of tensors."""

    module: LayerGraph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def flattened(program: Program) -> Flat:
    """The flat form of a program; the program is left as it is."""
    module = evaluated(program).cpu()
    nodes, _ = flat_outputs(module)
    inputs = input_names(module.interface)
    names = tuple(f"{name}_output" if name in inputs else name for name in nodes.values())
    module.graph.output_node().args = (tuple(nodes),)
    module.__dict__["interface"] = _flat_interface(module.interface, inputs, len(nodes))
    module.recompile()
    return Flat(module, inputs, names)


def input_names(interface: Interface) -> tuple[str, ...]:
    """A name for each graph input: the argument's, numbered where an argument holds several tensors."""
    names = [""] * interface.input_count
    for argument in interface.arguments:
        for i, place in enumerate(argument.leaves):
            if place is not None:
                name = re.sub(r"\W", "_", argument.name)
                names[place] = name if len(argument.leaves) == 1 else f"{name}_{i}"
    return tuple(names)


def flat_outputs(module: LayerGraph) -> tuple[dict[Node, str], list[Leaf]]:
    """The nodes that the model's output in evaluation holds, each once and named, and where each of its leaves is."""
    results = module.graph.output_node().args[0]
    results = results if isinstance(results, list | tuple) else (results,)
    nodes: dict[Node, str] = {}
    leaves: list[Leaf] = []
    for result, name in zip(results, output_names(module.interface.output_specs[1]), strict=False):
        if isinstance(result, Node):
            nodes.setdefault(result, name)
            is_number = not isinstance(result.meta.get("val"), torch.Tensor)
            leaves.append(Leaf(list(nodes).index(result), is_number=is_number))
        else:
            leaves.append(Leaf(None, result))
    return nodes, leaves


def _flat_interface(interface: Interface, inputs: Sequence[str], outputs: int) -> Interface:
    leaf = pytree.tree_structure(0)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])
    arguments = tuple(Argument(name, leaf, (i,), (None,)) for i, name in enumerate(inputs))
    spec = pytree.tree_structure((0,) * outputs)
    return replace(interface, signature=signature, arguments=arguments, output_specs=(spec, spec))


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each leaf of an output, from the fields and keys that lead to it: ``logits``, ``states_0``."""
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path(numbered)[0]]
    except ValueError:  # a container that was registered without names for its children
        paths = [(pytree.SequenceKey(i),) for i in range(spec.num_leaves)]
    names: list[str] = []
    for path in paths:
        name = "_".join(re.sub(r"\W+", "_", pytree.keystr((key,))).strip("_") for key in path)
        name = name if re.match(r"[^\W\d]", name) else f"output_{name}".rstrip("_")
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def examples(program: Program) -> list[torch.Tensor]:
    """The program's example inputs as its graph takes them, on the CPU, at the sizes that its dimensions name."""
    interface = program.module.interface
    flat = [t.detach().cpu() for t in interface.bind(program.example_args, program.example_kwargs)]
    return resized(program, flat, lambda dimension: dimension.size)


def other_sizes(program: Program) -> Iterator[tuple[str, list[list[torch.Tensor]]]]:
    """What else a lowering should be tried on: a description, and candidates of which the first that runs will do.

    The sizes of one candidate follow one rule, since equal sizes of an example often have to stay equal.
    """
    if not any(d.dynamic for d in program.dimensions):
        return
    base = examples(program)
    rules: list[Callable[[Dimension], int]] = [
        lambda d: d.size + 1,
        lambda d: 2 * d.size,
        lambda d: max(2, d.size // 2),
        lambda d: d.size + (d.axis == 0),
        lambda d: d.size * (1 + (d.axis == 0)),
    ]
    yield "another size", [resized(program, base, rule) for rule in rules]
    yield "a batch of one", [resized(program, base, lambda d: 1 if d.axis == 0 else d.size)]
