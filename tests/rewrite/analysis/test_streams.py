"""Streams and branches: what is carried on, who writes and reads it, what kind of branch adds to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program
from rewrite.analysis.branches import branches
from rewrite.analysis.carry import carried, sources
from rewrite.analysis.norms import norms
from rewrite.analysis.residuals import residual_adds
from rewrite.analysis.streams import stream_of, streams
from rewrite.analysis.uses import Uses
from tests.captures import capture, shared

DIM = 8


class Attention(nn.Module):
    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        scores = (self.q(x) @ self.k(memory).transpose(-1, -2) / DIM**0.5).softmax(-1)
        return self.out(scores @ self.v(memory))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(DIM, 16), nn.Linear(DIM, 16), nn.Linear(16, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))


class Block(nn.Module):
    def __init__(self, branch: nn.Module, form: str = "pre", p: float = 0.0) -> None:
        super().__init__()
        self.branch, self.form, self.drop = branch, form, nn.Dropout(p)
        self.norm, self.last = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.scale = nn.Parameter(torch.full((DIM,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "post":
            return self.norm(x + self.drop(self.branch(x)))
        if self.form == "res-post":
            return x + self.drop(self.norm(self.branch(x)))
        if self.form == "peri":
            return x + self.last(self.branch(self.norm(x)))
        if self.form == "scaled":
            return x + self.drop(self.branch(self.norm(x)) * self.scale)
        if self.form == "plain":
            return x + self.branch(x)
        return x + self.drop(self.branch(self.norm(x)))


def program_of(*blocks: nn.Module) -> Program:
    return capture(nn.Sequential(nn.Linear(4, DIM), *blocks, nn.LayerNorm(DIM), nn.Linear(DIM, 3)), (torch.randn(2, 5, 4),))


@pytest.mark.parametrize(
    ("form", "order", "norm", "scaled"),
    [
        ("pre", "pre", "1.norm", False),
        ("post", "post", "1.norm", False),
        ("res-post", "res-post", "1.norm", False),
        ("peri", "peri", "1.norm", False),
        ("scaled", "pre", "1.norm", True),
        ("plain", "none", None, False),
    ],
)
def test_order_norms_scale_and_dropout(form: str, order: str, norm: str | None, scaled: bool) -> None:
    first, second = branches(program_of(Block(Attention(), form, 0.1), Block(ffn(), form, 0.1)))
    assert (first.order, second.order) == (order, order)
    assert (first.path, second.path) == ("1.branch", "2.branch")
    assert (first.kind, second.kind) == ("attention", "ffn")
    around = [str(n.target) for n in (*first.norms, *first.end_norms, *first.stream_norms)]
    assert around == ([norm, "1.last"] if form == "peri" else [norm] if norm else [])
    assert (first.scale is not None) is scaled
    assert str(first.output.target) == "1.branch.out"
    assert [p for _, p in first.dropouts] == ([] if form in ("peri", "plain") else [0.1])
    assert first.leaks == ()


@pytest.mark.parametrize(
    ("branch", "kind"),
    [
        (Attention, "attention"),
        (ffn, "ffn"),
        (Gated, "gated ffn"),
        (lambda: nn.Linear(DIM, DIM), "other"),
    ],
)
def test_kinds(branch: Callable[[], nn.Module], kind: str) -> None:
    (found,) = branches(program_of(Block(branch())))
    assert found.kind == kind
    assert [str(n.target).rpartition(".")[2] for n in found.parts.first] == {
        "attention": ["q", "k", "v"],
        "ffn": ["0"],
        "gated ffn": ["gate", "up"],
        "other": ["branch"],
    }[kind]


def test_a_convolutional_branch_and_its_channels() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.out = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.act(self.conv(x)))

    program = capture(nn.Sequential(nn.Conv2d(3, 6, 1), Residual(), Residual()), (torch.randn(2, 3, 7, 7),))
    (stream,) = streams(program)
    assert stream.size == 6
    assert set(stream.values.values()) == {1}
    assert [b.kind for b in branches(program)] == ["convolutional"] * 2
    assert [str(w.target) for w in stream.writers] == ["0", "1.out", "2.out"]


class LeftOut(nn.Module):
    """A branch that is left out sample by sample in training; the draw's size is read first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(DIM), ffn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(self.norm(x))
        return x + (y * torch.empty(x.shape[0], 1, 1).bernoulli_(0.5) if self.training else y)


def test_what_stochastic_depth_is_given_for_its_size_alone_is_not_carried() -> None:
    program = capture(nn.Sequential(nn.Linear(DIM, DIM), LeftOut()), (torch.randn(2, 5, DIM),))
    (branch,) = branches(program)
    (region,) = branch.carriers
    (given,) = program.graph.find_nodes(op="placeholder")
    assert given in region.args
    assert carried(program, region, given, 2) is None
    assert carried(program, region, branch.output, 2) == 2
    (addition,) = residual_adds(program)
    assert addition.branch is branch.output


def test_parallel_branches_share_their_start() -> None:
    class Parallel(nn.Module):
        def __init__(self, one: bool) -> None:
            super().__init__()
            self.one, self.attention, self.ffn, self.norm = one, Attention(), ffn(), nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + (self.attention(y) + self.ffn(y)) if self.one else x + self.attention(y) + self.ffn(y)

    for one in (True, False):
        found = branches(program_of(Parallel(one), Parallel(one)))
        assert sorted((b.layer, b.kind, b.parallel) for b in found if b.layer == 0) == [
            (0, "attention", True),
            (0, "ffn", True),
        ]
        assert len(found) == 4
        assert all(b.order == "pre" for b in found)


def test_tokens_in_front_windows_and_slices_are_carried() -> None:
    """A class token, positions, windows cut and put together, the class token taken out again: one stream."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.token = nn.Conv2d(3, DIM, 2, 2), nn.Parameter(torch.randn(1, 1, DIM))
            self.position = nn.Parameter(torch.randn(1, 17, DIM))
            self.block, self.norm, self.head = Block(ffn()), nn.LayerNorm(DIM), nn.Linear(DIM, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
            x = self.block(x)
            x = self.block(torch.cat([x[:, :1], x[:, 1:].unflatten(1, (4, 4)).roll(1, 1).flatten(1, 2)], 1))
            return self.head(self.norm(x[:, 0]))

    program = capture(Tokens(), (torch.randn(2, 3, 8, 8),))
    (stream,) = streams(program)
    assert {str(w.target) for w in stream.writers} == {"token", "position", "embed", "block.branch.2"}
    assert {str(r.node.target) for r in stream.readers} == {"block.norm", "norm"}
    embed = next(n for n in stream.values if n.target == "embed")
    assert stream.values[embed] == 1
    assert stream.torn is None


def test_offsets_and_other_readers_are_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.read = Block(ffn()), nn.Linear(DIM, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x + 1.0)
            return x + x.mean(-1, keepdim=True) + self.read(x).sum(-1, keepdim=True)

    program = program_of(Odd())
    (stream,) = streams(program)
    assert len(stream.offsets) == 3
    assert {"1.read", "1.block.norm"} <= {str(r.node.target) for r in stream.readers}


def test_encoder_and_decoder_are_apart() -> None:
    encoder, decoder = streams(shared("t5"))
    assert (len(encoder.residual), len(decoder.residual)) == (4, 6)
    kinds = [(b.layer, b.kind) for b in branches(shared("t5"))]
    assert kinds[4:7] == [(2, "attention"), (2, "cross-attention"), (2, "ffn")]


def test_development_models() -> None:
    """Blocks, kinds and orders as their modules have them."""
    for name, layers, kinds, orders in (
        ("bert", 2, {"attention", "ffn"}, {"post"}),
        ("gpt2", 2, {"attention", "ffn"}, {"pre"}),
        ("llama", 2, {"attention", "gated ffn"}, {"pre"}),
        ("convnext_atto", 5, {"convolutional"}, {"inner"}),
    ):
        found = branches(shared(name))
        assert len({b.layer for b in found}) == layers, name
        assert {b.kind for b in found} == kinds, name
        assert {b.order for b in found} == orders, name
        assert len(found) == layers * len(kinds), name


def test_the_embedding_norm_of_bert_has_a_stream_of_its_own() -> None:
    program = shared("bert")
    norm = norms(program)[0]
    assert norm.path == "embeddings.LayerNorm"
    (value,) = norm.node.all_input_nodes
    stream = stream_of(program, value, -1)
    assert len(stream.writers) == 3
    assert [r.node for r in stream.readers] == [norm.node]
    assert stream.residual == ()


def test_uses_of_tied_and_shared_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(9, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.mix(self.embed(x))))

    program = capture(Tied(), (torch.randint(9, (2, 5)),))
    uses, module = Uses(program), program.module
    assert len(uses.calls("mix")) == 2
    weight = module.get_parameter("embed.weight")
    assert uses.names(weight) == ["embed.weight", "head.weight"]
    assert [str(n.target) for n in uses.nodes(weight)] == ["embed", "head"]
    assert not uses.alone(weight)
    assert not uses.alone(module.get_parameter("mix.weight"))


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "reshape": lambda x: x.reshape(-1, DIM),
    "windows": lambda x: x.unflatten(1, (2, 3)).transpose(0, 1).flatten(0, 1),
    "select": lambda x: x[:, 0],
    "slice": lambda x: x[:, 1:4],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(2, 1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "stack": lambda x: torch.stack([x, x], 2),
    "cat": lambda x: torch.cat([x, x], 1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "index": lambda x: x[:, torch.tensor([0, 2])].flatten(0, 1),
    "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum(1, keepdim=True),
    "scaled": lambda x: x * 3.0 / 2.0,
    "masked": lambda x: x.masked_fill(x.sum(-1, keepdim=True) > 0, 0.0),
    "pad": lambda x: F.pad(x, (0, 0, 1, 2)),
    "gated by rows": lambda x: x * x.sum(-1, keepdim=True).sigmoid(),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_is_carried_keeps_a_mean_of_zero(name: str) -> None:
    """Along the axis that the analysis gives, rows whose mean is 0 stay so; values say it, not the rules."""

    class Moving(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return MOVES[name](x)

    x = torch.randn(4, 6, DIM, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    program = capture(Moving(), (x,))
    start = next(n for n in program.graph.nodes if n.op == "placeholder")
    (end,) = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes
    stream = stream_of(program, start, -1)
    if name == "index":
        assert end not in stream.values or stream.values[end] == 1
        return
    assert end in stream.values
    result = MOVES[name](x)
    assert result.shape[stream.values[end]] == DIM
    assert result.mean(stream.values[end]).abs().max() < 1e-12


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.relu(),
    "weighted": lambda x: x * torch.arange(8.0),
    "flatten": lambda x: x.flatten(1),
    "a part of it": lambda x: x[..., 1:],
}


@pytest.mark.parametrize("change", MIXES.values(), ids=MIXES)
def test_what_mixes_or_weights_the_axis_is_not_carried(change: Callable[[Tensor], Tensor]) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return change(x)

    program = capture(Mixing(), (torch.randn(4, 6, DIM),))
    start = next(n for n in program.graph.nodes if n.op == "placeholder")
    (end,) = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes
    assert end not in stream_of(program, start, -1)
    assert all(carried(program, user, start, 2) is None for user in start.users)
    assert list(sources(program, start, 2)) == []
