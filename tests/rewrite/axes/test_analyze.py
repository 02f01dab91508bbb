"""The axis analysis on modules that hide their dimensions well, and what resizing them keeps."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program, RewriteError
from rewrite.axes import operators
from rewrite.axes.analyze import analyze
from rewrite.axes.call import Place
from rewrite.axes.check import check
from rewrite.axes.resize import resize
from rewrite.axes.table import Table
from rewrite.graph.edit import Editor
from tests.captures import capture
from tests.models import zoo

HEADS, SIZE, DIM = 2, 3, 6


class Packed(nn.Module):
    """Attention with q, k and v packed in one projection, in any order of (3, heads, head_dim)."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.qkv(x)
        if self.order == "chunk":
            q, k, v = (t.view(batch, length, HEADS, SIZE).transpose(1, 2) for t in y.chunk(3, -1))
        elif self.order == "3hd":
            q, k, v = y.view(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        elif self.order == "h3d":
            q, k, v = y.view(batch, length, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = y.view(batch, length, HEADS, SIZE, 3).permute(4, 0, 2, 1, 3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        return x + self.out(y)


class Grouped(nn.Module):
    """Four query heads on two key and value heads, all of one size, by repeat_interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, n) for n in (8, 4, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) / 2**0.5).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


class Flattened(nn.Module):
    """A convolution, flattened, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 25, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


class Depthwise(nn.Module):
    """Pointwise, depthwise, norm, group norm, pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(4, 8)
        self.narrow = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.group(self.norm(self.deep(self.widen(x))).relu()))


class Gated(nn.Module):
    """Gate and up in one matrix that is chunked."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(DIM, 10), nn.Linear(5, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Spelled(nn.Module):
    """A norm over channels that is spelled out between two transposes, with a literal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5))
        self.conv, self.after = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = F.layer_norm(y, (5,), self.weight, self.bias).permute(0, 3, 1, 2)
        return self.after(y)


class Shuffled(nn.Module):
    """Channels shuffled between two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.second(y)


class Custom(nn.Module):
    """A layer of one's own between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 9), nn.Linear(9, 4)
        self.scale = nn.Parameter(torch.rand(9))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.first(x) * self.scale, self.first(x).neg()], -1)
        return self.second(y[..., :9] + y[..., 9:])


class Shared(nn.Module):
    """Query heads, a key head and a value head in one projection: the last two picked from its end by number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, (3 + 2) * SIZE), nn.Linear(3 * SIZE, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).view(*x.shape[:2], 5, SIZE)
        q, k, v = (t.transpose(1, 2) for t in (y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Sloped(nn.Module):
    """Each head's scores fall with the distance, by a slope that is computed from its number."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for m in (self.q, self.k, self.v))
        slopes = 0.5 ** torch.arange(1, 1 + HEADS)
        scores = q @ k.transpose(-1, -2) / 2 - slopes[:, None, None] * torch.arange(x.shape[1])
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Partly(nn.Module):
    """The part of a head that is turned is all of it, and what is left nothing; every second unit is a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 8), nn.Linear(4, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.cat([y[..., :8].neg(), y[..., 8:]], -1)
        return x + self.down(y[..., ::2].sigmoid() * y[..., 1::2])


class Bare(nn.Module):
    """A norm without a weight over two heads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(DIM, 4), nn.RMSNorm(8, elementwise_affine=False), nn.Linear(8, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return x + self.down(self.norm(torch.cat([y, y.neg()], -1)))


class Turned(nn.Module):
    """A part of a projection as complex numbers: the part before it must leave an even stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def forward(self, x: Tensor) -> Tensor:
        plain, turned = self.first(x).split([4, 8], -1)
        turned = torch.view_as_real(torch.view_as_complex(turned.unflatten(-1, (-1, 2))) * 1j).flatten(-2)
        return x + self.last(torch.cat([plain, turned], -1))


class Shifted(nn.Module):
    """Scores shifted by a reshape of the places alone, as relative positions are: heads are not torn by it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 7)
        return self.last(y.reshape(2, 4, 7, 5)[..., 0].transpose(1, 2))


IMAGE, TOKENS = (2, 3, 5, 5), (2, 5, DIM)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "packed, chunked": (lambda: Packed("chunk"), TOKENS, 2),
    "packed, 3 heads dim": (lambda: Packed("3hd"), TOKENS, 2),
    "packed, heads 3 dim": (lambda: Packed("h3d"), TOKENS, 2),
    "packed, heads dim 3": (lambda: Packed("hd3"), TOKENS, 2),
    "grouped queries": (Grouped, (2, 5, 8), 3),
    "convolution, flatten, linear": (Flattened, IMAGE, 2),
    "depthwise": (Depthwise, IMAGE, 2),
    "gated": (Gated, TOKENS, 1),
    "a norm spelled out": (Spelled, IMAGE, 2),
    "shuffled channels": (Shuffled, (2, 4, 5, 5), 2),
    "a concatenation cut again": (Custom, (2, 4), 1),
    "a key head that all share": (Shared, TOKENS, 2),
    "numbered heads": (Sloped, TOKENS, 2),
    "an empty part and every second unit": (Partly, TOKENS, 1),
    "a norm without weight": (Bare, TOKENS, 1),
    "complex numbers": (Turned, TOKENS, 2),
    "places reshaped": (Shifted, (2, 5, 5), 1),
}


@functools.cache
def captured(name: str) -> Program:
    build, shape, _ = MODULES[name]
    torch.manual_seed(0)
    return capture(build(), (torch.randn(shape),))


@pytest.mark.parametrize("name", MODULES)
def test_every_dimension_at_a_prime_of_its_own(name: str) -> None:
    program = captured(name)
    assert check(Editor(program.clone(), "check")) >= MODULES[name][2]


def grown(table: Table, name: str, more: int) -> dict:
    dim = table.named[name]
    return {dim: [*range(dim.size), *[-1] * more]}


def reading_zeros(path: str, tensor: Tensor, places: Sequence[Place], shape: tuple[int, ...]) -> Tensor | None:
    """New entries are random, but those that are read are 0."""
    made = torch.randn(shape)
    for place in places:
        if place.role == "in":
            kept = torch.arange(shape[place.axis]) < tensor.shape[place.axis]
            made = made * kept.reshape([-1 if i == place.axis else 1 for i in range(len(shape))])
    return made


GROWN = [
    ("packed, chunked", "heads.0", 2),
    ("packed, 3 heads dim", "heads.0", 1),
    ("grouped queries", "kv_heads.0", 1),
    ("gated", "ffn.0", 3),
    ("convolution, flatten, linear", "channels.0", 2),
    ("a key head that all share", "heads.0", 2),
    ("numbered heads", "heads.0", 2),
    ("an empty part and every second unit", "ffn.0", 3),
]


@pytest.mark.parametrize(("name", "dim", "more"), GROWN, ids=[g[0] for g in GROWN])
def test_grown_with_readers_of_zero_the_function_stays(name: str, dim: str, more: int) -> None:
    program = captured(name)
    larger = program.clone()
    edit, table = Editor(larger, "grow"), analyze(larger)
    resize(edit, table, grown(table, dim, more), reading_zeros)
    edit.follow()
    edit.revalue()
    larger.module.recompile()
    x = program.example_args[0]
    expected, found = (p.module.eval().double()(x.double()) for p in (program.clone(), larger))
    assert torch.allclose(found, expected, atol=1e-12)
    assert sum(p.numel() for p in larger.module.parameters()) > sum(p.numel() for p in program.module.parameters())


def test_a_rigid_dimension_is_refused_with_its_reason() -> None:
    program = captured("convolution, flatten, linear")
    table = analyze(program)
    rigid = next(d for d in table.named.values() if d.rigid)
    with pytest.raises(RewriteError, match="cannot change its size: "):
        resize(Editor(program.clone(), "grow"), table, {rigid: list(range(rigid.size + 1))})


class Sines(nn.Module):
    """Positions by sine and cosine of every second number, added to a projection, and a table of ones on a diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1]).unsqueeze(1) / 10 ** (torch.arange(0, 8, 2) / 8)
        return self.last(self.first(x) @ torch.eye(8) + torch.cat([angles.sin(), angles.cos()], -1))


def test_what_is_numbered_cannot_change() -> None:
    program = capture(Sines(), (torch.randn(3, 5, 4),))
    table = analyze(program)
    assert table.unknown == ()
    assert all(d.rigid for d in table.named.values() if d.size in (4, 8))
    assert check(Editor(program.clone(), "check")) == len(table.resizable)


def test_what_lies_beside_complex_numbers_is_even() -> None:
    program = captured("complex numbers")
    table = analyze(program)
    (name,) = (n for n, d in table.resizable.items() if "even" in d.uses)
    with pytest.raises(RewriteError, match="as complex numbers, which ask for an even size: 6 is"):
        resize(Editor(program.clone(), "grow"), table, grown(table, name, 1))


@torch.library.custom_op("rewrite_tests::mixed", mutates_args=())
def mixed(x: Tensor) -> Tensor:
    """The mean of each unit and the one beside it."""
    return (x.unflatten(-1, (-1, 2)).mean(-1, keepdim=True).expand(*x.shape[:-1], -1, 2)).flatten(-2)


@mixed.register_fake
def _(x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError("an odd number of units")
    return torch.empty_like(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(mixed(self.first(x))).relu())


def test_an_operator_of_ones_own_is_rigid_by_name_or_has_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Mixed(), (torch.randn(3, 4),))
    table = analyze(program)
    assert table.unknown == ("rewrite_tests.mixed",)
    assert {d.size for d in table.resizable.values()} == {4, 6}
    monkeypatch.setitem(operators.RULES, "rewrite_tests.mixed", lambda call: call.axes("x"))
    assert {d.size for d in analyze(program).resizable.values()} == {4, 6, 8}
    with pytest.raises(RewriteError, match=r"^dim\.\d: .*an odd number of units"):  # what that rule forgot
        check(Editor(program.clone(), "check"))


class CountedHeads(nn.Module):
    """Two attentions whose heads lie beside the batch by one computed number, the second's batch that of copied tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.tokens = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        batch, beside = x.shape[0], x.shape[0] * 4
        found = []
        for i, given in enumerate((x, self.tokens.expand(batch, -1, -1))):
            q = self.q[i](given).view(batch, -1, 4, 2).transpose(1, 2).reshape(beside, -1, 2)
            heads = (q @ q.transpose(1, 2)).softmax(-1) @ q
            found.append(self.out[i](heads.view(batch, 4, -1, 2).transpose(1, 2).reshape(batch, -1, 8)))
        return torch.cat(found, 1)


def test_a_number_in_a_computed_size_is_one_dimension_wherever_it_is_used() -> None:
    program = capture(CountedHeads(), (torch.randn(5, 6, 8),))
    assert [d.size for d in analyze(program).resizable.values()].count(4) == 1
    assert check(Editor(program.clone(), "check")) > 1


class Patches(nn.Module):
    """Channels and rows of patches beside the batch, by two products: (batch * 6) * 4, as in timm's MobileViT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Conv2d(3, 6, 1), nn.Linear(2, 2), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, channels, high, wide = x.shape
        x = self.mix(x.reshape(batch * channels * (high // 2), 2, wide // 2, 2).transpose(1, 2))
        return self.head(x.transpose(1, 2).reshape(batch, channels, high, wide))


def test_numbers_in_a_product_of_a_product() -> None:
    program = capture(Patches(), (torch.randn(2, 3, 8, 8),))
    assert 6 in {d.size for d in analyze(program).resizable.values()}
    assert check(Editor(program.clone(), "check")) >= 2


QUICK = ("falcon", "gpt2", "llama", "mixtral", "t5")
ALL = [*zoo.transformers_cases(), *zoo.timm_cases()]
MODELS = [case for case in ALL if case.name in QUICK or os.environ.get("REWRITE_ZOO")]


@pytest.mark.parametrize("case", MODELS, ids=[case.name for case in MODELS])
def test_models(case: zoo.Case) -> None:
    """Every dimension fits at a prime of its own; `REWRITE_ZOO=1` tries the whole zoo, which takes an hour of one core."""
    args, kwargs = case.inputs(2, 7)
    program = capture(case.build(), args, kwargs)
    table = analyze(program)
    assert check(Editor(program.clone(), "check")) == len(table.resizable)
    if case.name in QUICK:
        assert table.unknown == ()
        assert {"hidden", "ffn.0", "vocab"} <= table.resizable.keys()
        assert table.resizable.keys() & {"heads.0", "kv_heads.0"}
