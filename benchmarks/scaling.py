"""How the steps of a capture, a pass, its proof and a graft grow with the number of blocks: seconds, and the exponent.

    python benchmarks/scaling.py [--rounds 3] [--sizes 1000 2000 5000 10000]

Programs of so many blocks (norm, linear layer, stochastic depth, residual addition) are made here node by node: exporting
them is torch's time. CPU seconds of this process, the median of the rounds; the exponent e of seconds ~ blocks^e is fitted
to all sizes by least squares in logarithms.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

import rewrite
from rewrite import Program
from rewrite.analysis.match import Layer, Var, find
from rewrite.analysis.norms import norms
from rewrite.analysis.residuals import post_norms, residual_adds
from rewrite.frontend.align import align
from rewrite.frontend.lift import lift_layers
from rewrite.frontend.literals import follow_dtypes
from rewrite.frontend.skeleton import Skeleton
from rewrite.frontend.switch import switch_modes
from rewrite.graph import meta
from rewrite.graph.copies import uncollected
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import aten
from rewrite.graph.program import LayerGraph, Origin
from rewrite.proof.frame import frame
from rewrite.proof.kept import structure
from rewrite.torch_private import FakeTensorMode

WIDTH = 4
Step = tuple[str, Callable[[], Any]]


class Block(nn.Module):
    """x + linear(norm(x)), its branch dropped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.linear(self.norm(x))
        if self.training:
            branch = branch * torch.empty(len(x), 1, device=x.device).bernoulli_(0.9)
        return x + branch


class Blocks(nn.Module):
    """So many blocks, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000, 5000, 10000])
    parser.add_argument("--proven", type=int, default=10000, help="the largest size at which the proof is run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table: dict[str, dict[int, float]] = {}
    rewrite.capture(nn.Identity(), (torch.randn(2),))
    measured(100, options.proven)  # what runs for the first time is slow
    for size in options.sizes:
        rounds = [measured(size, options.proven) for _ in range(options.rounds)]
        for step in rounds[0]:
            table.setdefault(step, {})[size] = statistics.median(r[step] for r in rounds)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread, "
        f"{time.strftime('%Y-%m-%d')}, {options.rounds} rounds\n"
    )
    print("| step | " + " | ".join(f"{size} blocks" for size in options.sizes) + " | exponent |")
    print("| --- |" + " --- |" * (len(options.sizes) + 1))
    for step, seconds in table.items():
        cells = " | ".join(f"{seconds[size]:.3f} s" if size in seconds else "" for size in options.sizes)
        print(f"| {step} | {cells} | {exponent(seconds):.2f} |")


def exponent(seconds: dict[int, float]) -> float:
    """The slope of a line through the points in logarithms."""
    x, y = [math.log(size) for size in seconds], [math.log(max(s, 1e-6)) for s in seconds.values()]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    across = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / across if across else math.nan


def measured(size: int, proven: int) -> dict[str, float]:
    """The CPU seconds of each step."""
    found: dict[str, float] = {}
    for steps, around in ((capture_steps(size), uncollected), (pass_steps(size, proven), contextlib.nullcontext)):
        for name, action in steps:
            gc.collect()
            began = time.process_time()
            with around():  # as within a capture
                action()
            found[name] = time.process_time() - began
    return found


def capture_steps(size: int) -> Iterator[Step]:
    """From two flat graphs to layers."""
    model = Blocks(size)
    training, evaluation = flat_graph(model, training=True), flat_graph(model, training=False, dtype=torch.bfloat16)
    alignments: list[Any] = []
    yield "align train and eval", lambda: alignments.append(align(training, evaluation))
    skeleton = Skeleton(model)

    def switch() -> None:
        skeleton.index(training)
        switch_modes(training, evaluation, alignments[0], skeleton.place)

    yield "switch modes", switch
    dtypes = {torch.float32: torch.bfloat16}
    yield "follow dtypes", lambda: follow_dtypes(training, alignments[0].partner, evaluation, dtypes)
    yield "lift layers", lambda: lift_layers(training, skeleton, model)
    plain = Skeleton(model)

    def fresh() -> None:
        for _ in range(size):
            plain.put(plain.fresh("relu"), nn.ReLU())

    yield "free names", fresh


def flat_graph(model: Blocks, *, training: bool, dtype: torch.dtype = torch.float32) -> Graph:
    """What an export of the model holds, in one mode and dtype."""
    graph, made = Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    with made:
        values = {shape: torch.empty(shape, dtype=dtype) for shape in ((2, WIDTH), (2, 1), (WIDTH,), (WIDTH, WIDTH))}

    def node(kind: str, target: Any, args: tuple[Any, ...], shape: tuple[int, ...], path: str = "") -> Any:
        new = graph.create_node(kind, target, args, {})
        meta.VALUE.set(new, values[shape])
        owners = [path.rpartition(".")[0], path] if path.count(".") > 1 else [path]
        meta.STACK.set(new, {p: (p, Block) for p in owners if path})
        return new

    x = node("placeholder", "x", (), (2, WIDTH))
    reads = {n: node("get_attr", n, (), tuple(p.shape)) for n, p in model.named_parameters()}
    for i in range(len(model.blocks)):
        at = f"blocks.{i}"
        weight, bias = reads[f"{at}.norm.weight"], reads[f"{at}.norm.bias"]
        y = node("call_function", aten.layer_norm.default, (x, [WIDTH], weight, bias), (2, WIDTH), f"{at}.norm")
        weight, bias = reads[f"{at}.linear.weight"], reads[f"{at}.linear.bias"]
        y = node("call_function", aten.linear.default, (y, weight, bias), (2, WIDTH), f"{at}.linear")
        if training:
            mask = node("call_function", aten.new_empty.default, (y, [2, 1]), (2, 1), at)
            mask = node("call_function", aten.bernoulli.p, (mask, 0.9), (2, 1), at)
            y = node("call_function", aten.mul.Tensor, (y, mask), (2, WIDTH), at)
        x = node("call_function", aten.add.Tensor, (x, y), (2, WIDTH), at)
    graph.output((x,))
    return graph


def layer_program(model: Blocks) -> Program:
    """The model in evaluation, as capture would make it of one without modes."""
    interface = rewrite.capture(nn.Sequential(nn.Linear(WIDTH, WIDTH)), (torch.randn(2, WIDTH),)).module.interface
    skeleton = Skeleton(model)
    graph = flat_graph(model, training=False)
    skeleton.index(graph)
    lift_layers(graph, skeleton, model)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    origin = Origin(f"{Blocks.__module__}.{Blocks.__qualname__}", shapes)
    module = LayerGraph(skeleton.root, graph, interface)
    return Program(module.eval(), (torch.randn(2, WIDTH),), {}, (), (), origin)


def pass_steps(size: int, proven: int) -> Iterator[Step]:
    """A pass over a program, its proof, the graft; each edit by itself; what passes ask."""
    model = Blocks(size).eval()
    program = layer_program(model)
    copied = program.clone()
    yield "clone", program.clone
    yield "norms, residual additions, post-norms", lambda: (residual_adds(program), post_norms(program, norms(program)))
    pattern = Layer(nn.Linear, Layer(nn.LayerNorm, Var("x")))
    yield "match a pattern", lambda: list(find(program, pattern))
    editor = Editor(copied, "benchmark")
    paths = [f"blocks.{i}" for i in range(size)]
    layers = [nn.RMSNorm(WIDTH) for _ in paths]
    yield "replace a layer each", lambda: [editor.replace_layer(f"{p}.norm", n) for p, n in zip(paths, layers, strict=True)]
    bias = torch.zeros(WIDTH)
    yield "set a parameter each", lambda: [editor.set_parameter(f"{p}.linear.bias", bias) for p in paths]
    calls = [node for node, _ in copied.layers() if str(node.target).endswith("linear")]

    def insert() -> None:
        for call in calls:
            made = editor.insert_function(aten.neg.default, [call], after=call)
            editor.rewire(call, made, users=lambda user, made=made: user is not made)

    yield "insert and rewire each", insert

    def insert_layers() -> None:
        for i, call in enumerate(calls):
            made = editor.insert_layer(f"blocks.{i}.after", nn.ReLU(), [call], after=call)
            editor.rewire(call, made, users=lambda user, made=made: user is not made)

    yield "insert and rewire a layer each", insert_layers
    yield "the frame of these", lambda: frame(program, copied, editor.changes)
    yield "structure and kept of these", lambda: list(structure(program, copied, editor.changes))
    results: list[Program] = []
    yield "dyt, without proof", lambda: results.append(rewrite.apply(program, "dyt", verify=False))
    if size <= proven:
        yield "dyt, with proof", lambda: rewrite.apply(program, "dyt")
    yield "graft, without proof", lambda: rewrite.graft(results[0], model, verify=False)


if __name__ == "__main__":
    main()
