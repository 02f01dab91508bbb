"""merge-linears: the models the kit tries it on, the merged layer by hand, names, and each reason to leave a layer alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewrite import RewriteError, apply, graft
from rewrite.analysis.siblings import joined_name
from rewrite.graph.program import Program
from rewrite.passes.depth.merge_linears import MergedLinear
from tests.passes.table import Row

DIM = 8
X = torch.randn(2, 5, DIM)

ROWS = [
    Row("merge-linears", "llama", 32),
    Row("merge-linears", "bert", 20),
    Row("merge-linears{within=module}", "vit", 20),
    Row("merge-linears", "t5", 50),
    Row("merge-linears", "gpt2", 0),
    Row("merge-linears", "convnext_atto", 0),
    Row("merge-linears", "resnet18", 0),
    Row("merge-linears", "vit_tiny_patch16_224", 0),
]


class Attention(nn.Module):
    """Three projections of one value; ``own`` changes one of them."""

    def __init__(
        self, own: Callable[[Attention], None] = lambda self: None, sizes: tuple[int, int, int] = (8, 4, 4)
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, size) for size in sizes)
        self.o_proj = nn.Linear(DIM, DIM)
        own(self)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = self.q_proj(n), self.k_proj(n), self.v_proj(n)
        return self.o_proj(q * torch.cat([k, v], -1))


class Block(nn.Module):
    """Attention and a gated FFN side by side on one normed value, as in GPT-J, PaLM and Command R."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(DIM), Attention()
        self.attn.norm = nn.Identity()
        self.mlp = nn.ModuleDict({n: nn.Linear(DIM, 16) for n in ("gate_proj", "up_proj")})
        self.down = nn.Linear(16, DIM)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.attn(n) + self.down(torch.sigmoid(self.mlp["gate_proj"](n)) * self.mlp["up_proj"](n))


def merged(program: Program) -> dict[str, MergedLinear]:
    return {name: layer for name, layer in program.module.named_modules() if isinstance(layer, MergedLinear)}


def skipped(model: nn.Module, step: str = "merge-linears") -> dict[str, str]:
    program = apply(model, step, args=(X,))
    return {skip.path: skip.reason for skip in program.history[0].skipped}


def test_by_hand() -> None:
    model = Attention()
    program = apply(model, "merge-linears", args=(X,))
    layer = merged(program)["qkv_proj"]
    assert torch.equal(layer.weight, torch.cat([model.q_proj.weight, model.k_proj.weight, model.v_proj.weight]))
    assert torch.equal(layer.bias, torch.cat([model.q_proj.bias, model.k_proj.bias, model.v_proj.bias]))
    assert (layer.paths, layer.sizes) == (("q_proj", "k_proj", "v_proj"), (8, 4, 4))
    assert list(program.module.state_dict()) == [
        *("norm.weight", "norm.bias", "qkv_proj.weight", "qkv_proj.bias", "o_proj.weight", "o_proj.bias")
    ]
    assert torch.allclose(program.module(X), model(X), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        (("gate_proj", "up_proj"), "gate_up_proj"),
        (("query", "key", "value"), "query_key_value"),
        (("to_q", "to_k", "to_v"), "to_qkv"),
        (("wi_0", "wi_1"), "wi_0_1"),
        (("w1", "w3"), "w1_w3"),
        (("0", "1"), "0_1"),
        (("proj", "q_proj"), "proj_q_proj"),
        (("attn.q", "attn.k", "mlp.fc1"), "attn_qk_mlp_fc1"),
    ],
)
def test_names_are_those_that_users_know(names: tuple[str, ...], name: str) -> None:
    assert joined_name(names) == name


def test_branches_side_by_side_are_merged_in_their_block_and_apart_by_module() -> None:
    blocks = nn.Sequential(Block(), Block())
    found = merged(apply(blocks, "merge-linears", args=(X,)))
    assert [*found] == ["0.attn_qkv_proj_mlp_gate_up_proj", "1.attn_qkv_proj_mlp_gate_up_proj"]
    apart = merged(apply(blocks, "merge-linears{within=module}", args=(X,)))
    assert [*apart][:2] == ["0.attn.qkv_proj", "0.mlp.gate_up_proj"]


def test_blocks_that_read_one_value_are_not_merged_with_each_other_unless_asked() -> None:
    class Cross(nn.Module):
        """Each layer's keys and values of one memory."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(DIM, DIM) for n in ("k", "v")}) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return sum((layer["k"](x) * layer["v"](x) for layer in self.layers), torch.zeros(()))

    assert [*merged(apply(Cross(), "merge-linears", args=(X,)))] == ["layers.0.kv", "layers.1.kv"]
    assert [*merged(apply(Cross(), "merge-linears{within=model}", args=(X,)))] == ["layers.0_kv_1_kv"]


def _no_bias(model: Attention) -> None:
    model.k_proj = nn.Linear(DIM, 4, bias=False)


def _frozen(model: Attention) -> None:
    model.k_proj.requires_grad_(False)


def _tied(model: Attention) -> None:
    model.k_proj.weight = model.v_proj.weight


REASONS = {
    "no bias": (_no_bias, {"k_proj": "it differs from q_proj, which reads the same, in having a bias"}),
    "frozen": (_frozen, {"k_proj": "it differs from q_proj, which reads the same, in requires_grad"}),
    "tied": (_tied, {"k_proj": "it shares a tensor with v_proj.weight", "v_proj": "it shares a tensor with k_proj.weight"}),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_to_leave_a_layer_alone(name: str) -> None:
    own, reasons = REASONS[name]
    assert skipped(Attention(own)) == reasons


def test_a_layer_called_twice_written_into_or_read_by_code_is_left_alone() -> None:
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(DIM, DIM) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            read = self.c.weight.sum()
            return self.a(x) + self.a(x + 1) + torch.relu_(self.b(x)) + self.c(x) * read + self.d(x) + self.e(x)

    model = Busy()
    assert skipped(model) == {
        "a": "it is called more than once",
        "b": "its output is written in place",
        "c": "the model's code reads its tensors besides calling it",
    }
    assert [*merged(apply(model, "merge-linears", args=(X,)))] == ["de"]


def test_what_is_written_between_two_calls_keeps_them_apart() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            first = self.a(x)
            x[0].mul_(2)
            return first + self.b(x)

    reason = "what they read is written in place between their calls"
    assert skipped(Writes()) == {"a": reason, "b": reason}


def test_a_masked_layer_is_more_than_a_linear_layer() -> None:
    program = apply(Attention(), "random-prune{where=k_proj},merge-linears", args=(X,))
    (skip,) = program.history[1].skipped
    assert (skip.path, skip.reason) == ("k_proj", "it is a MaskedLinear, which is more than a linear layer")
    assert [*merged(program)] == ["qv_proj"]


def test_the_users_class_cannot_hold_it_and_says_so() -> None:
    model = Attention()
    program = apply(model, "merge-linears", args=(X,))
    for verify in (True, False):
        with pytest.raises(RewriteError, match=r"merge-linears took ._proj out, which the code of your class still calls"):
            graft(program, model, verify=verify)
