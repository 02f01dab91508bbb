"""Mixtures of experts that begin as copies of the FFN in whose place they stand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.fx import Interpreter

from rewrite.analysis.branches import Branch, branches
from rewrite.errors import RewriteError
from rewrite.graph.carve import carve, free_inputs
from rewrite.graph.module_calls import ModuleCall, module_calls
from rewrite.graph.nodes import attribute, module_stack
from rewrite.graph.program import Container
from rewrite.graph.regions import Region
from rewrite.graph.tree import names_of_tensors
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import CLOSE, NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Mixture(nn.Module):
    """y = Σ_e c_e(x) FFN_e(x), c the softmax over the ``top_k`` largest of the router's logits, 0 for the other experts.

    x [..., in], ``router.weight`` [experts, in]; each expert holds the layers of the FFN that it began as. ``end`` is what
    the FFN's module does last and at random (a dropout): once, to the sum. Every expert runs on every token, in all
    backends alike.
    """

    top_k: int

    def __init__(self, router: nn.Linear, experts: Sequence[Region], end: nn.Module, top_k: int) -> None:
        super().__init__()
        self.router, self.experts, self.end, self.top_k = router, nn.ModuleList(experts), end, top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found, chosen = self.router(x).topk(self.top_k, -1)
        shares = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], len(self.experts))
        shares = shares.scatter(-1, chosen, found.softmax(-1).to(x.dtype))
        parts = [shares[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts)]
        mixed: torch.Tensor = self.end(torch.stack(parts).sum(0))
        return mixed


class Site(NamedTuple):
    """An FFN in a module of its own."""

    path: str
    types: tuple[str, ...]
    call: ModuleCall


@dataclass(frozen=True)
class Upcycle(Pass):
    """Make each FFN a mixture of copies of it: y = Σ_e c_e(x) FFN_e(x), c = softmax over the top_k of R x, Σ c = 1.

    All experts begin as the FFN, and the combine weights sum to one after the choice of the top_k, so that the forward and
    the gradients of the old parameters are the same at the start. The router R is drawn from a normal distribution of
    deviation 0.02, from the seed: tokens go to different experts, which so become different in training. ``noise`` breaks
    the symmetry at once: each expert's matrices get normal noise of that share of their own deviation, and the forward is
    close instead of the same. With a single expert for each token its weight would be 1 whatever R is, and R would never
    learn: ``top_k`` is 2 or more. ``where`` chooses by the path of the FFN's module.

    Left alone, with the reason: an FFN that is no module of its own, that drops out within, or whose weights are shared.

    Source: Komatsuzaki et al., Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, ICLR 2023
    (arXiv 2212.05055), with the combine weights normalized after the choice.
    """

    name = "upcycle"
    inserts = (Mixture,)
    experts: int = option(8, "experts of each mixture", at_least=2)
    top_k: int = option(2, "experts that each token goes to", at_least=2)
    noise: float = option(0.0, "noise on the experts' matrices, as a share of their deviation", at_least=0)
    where: Selector = option(Selector("*"), "FFNs to upcycle, by their module: path glob, type:, re:, !, several with |")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.experts:
            raise RewriteError(f"upcycle{{experts={self.experts} top_k={self.top_k}}}: there are fewer experts than top_k")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW) if self.noise else Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        generator = torch.Generator().manual_seed(context.seed)
        for site in context.choose(list(_sites(program, context)), self.where):
            self._upcycle(program, context, site, generator)

    def _upcycle(self, program: Program, context: Context, site: Site, generator: torch.Generator) -> None:
        source, _ = site.call.single()
        first, end = _expert(program, site.call)
        old = dict(first.named_parameters())
        like = next(iter(old.values()))
        width = int(source.meta["val"].shape[-1])
        router = nn.Linear(width, self.experts, bias=False, device="meta")
        drawn = 0.02 * torch.randn(self.experts, width, generator=generator, dtype=torch.float64)
        router.weight = nn.Parameter(drawn.to(like.device, like.dtype))
        experts = [first, *(copy.deepcopy(first) for _ in range(self.experts - 1))]
        context.edit.replace_module(site.path, Mixture(router, experts, end, self.top_k))
        for e in range(self.experts):
            for name, tensor in old.items():
                place = f"{site.path}.experts.{e}.{name}"
                if self.noise and tensor.dim() > 1:
                    context.edit.set_parameter(place, _noisy(tensor.detach(), self.noise, generator))
                else:
                    context.edit.set_parameter(place, torch.clone, f"{site.path}.{name}")

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Experts whose logit is below the top_k-th have weight exp(-inf) / Σ = 0."""
        (x,) = inputs
        mixture: Any = new
        logits = x @ mixture.router.weight.t()
        least = logits.sort(-1).values[..., -mixture.top_k, None]
        shares = torch.where(logits < least, -torch.inf, logits).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for e, expert in enumerate(mixture.experts):
            total = total + shares[..., e, None] * Interpreter(expert, graph=expert.graphs["any"]).run(x)
        return F.dropout(total, mixture.end.p, mixture.end.training) if _drops(mixture.end) else total


def _drops(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Dropout) and layer.p > 0


def _noisy(tensor: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_meta:
        return tensor.clone()
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (tensor.double() + share * tensor.double().std() * noise.to(tensor.device)).to(tensor.dtype)


def _sites(program: Program, context: Context) -> Iterator[Site]:
    """The FFNs that stand in a module of their own; the others are noted."""
    names = names_of_tensors(program.module)
    for branch in branches(program):
        if branch.kind in ("ffn", "gated ffn"):
            call = _home(program, branch)
            reason = "it is no module of its own, with one tensor in and one out" if call is None else ""
            reason = reason or _obstacle(program, call, names)  # type: ignore[arg-type]
            if reason or call is None:
                context.skip(branch.path, reason)
            else:
                kind = call.stack[call.key][1]
                yield Site(call.path, (str(getattr(kind, "__qualname__", kind)).rpartition(".")[2],), call)


def _home(program: Program, branch: Branch) -> ModuleCall | None:
    """The largest module that holds an FFN's projections and nothing but parts of it."""
    inside = {*branch.nodes, *branch.carriers}
    for _, path, _ in module_stack(branch.parts.projections[0]):
        calls = module_calls(program.graph, path) if path else []
        for call in calls if len(calls) == 1 else ():
            own = {node for node in call.nodes if node.op == "call_module"}
            alone = set(branch.parts.projections) <= own <= inside and branch.addition not in call.nodes
            if alone and len(call.sources) == len(call.results) == 1:
                return call
    return None


def _obstacle(program: Program, call: ModuleCall, names: dict[int, list[str]]) -> str:
    """Why an FFN cannot be copied; empty if it can."""
    source, result = call.single()
    if free_inputs(call.nodes) != [source]:
        return "it reads more than the one tensor that it is given"
    last = program.layer(result) if result.op == "call_module" else None
    for node in call.nodes:
        layer = program.layer(node) if node.op == "call_module" else None
        if layer is not None and _drops(layer) and layer is not last:
            return f"{node.target} drops out within it: each expert would draw a mask of its own"
        if layer is not None and any(True for _ in layer.buffers()):
            return f"{node.target} holds a buffer, which experts would not share"
        if node.op == "call_module" and not f"{node.target}".startswith(f"{call.path}."):
            return f"it calls {node.target}, which is not its own"
    shared = [n for t in attribute(program.module, call.path).parameters() for n in names[id(t)] if len(names[id(t)]) > 1]
    return f"{shared[0]} is shared" if shared else ""


def _expert(program: Program, call: ModuleCall) -> tuple[Region, nn.Module]:
    """An FFN as a layer of its own, with copies of its layers, and what its module does last and at random."""
    source, result = call.single()
    nodes, end = list(call.nodes), nn.Identity()
    if result.op == "call_module" and _drops(program.layer(result)):
        end = copy.deepcopy(program.layer(result))  # type: ignore[assignment]
        nodes.remove(result)
        (result,) = result.all_input_nodes
    graph = carve(nodes, [result], [source])
    made = Region({"any": graph}, "an expert")
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            held = attribute(program.module, str(node.target))
            node.target = str(node.target).removeprefix(f"{call.path}.")
            _hang(made, node.target, copy.deepcopy(held))
    made.recompile()
    return made, end


def _hang(root: nn.Module, path: str, held: object) -> None:
    """Put a layer or a parameter at a path below a module."""
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, Container())
        root = root.get_submodule(part)
    setattr(root, name, held)
