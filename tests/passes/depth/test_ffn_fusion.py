"""ffn-fusion: the models the kit tries it on, the wide FFN by hand, runs and windows, and each reason to leave one alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError, apply
from rewrite.analysis.windows import cut
from rewrite.errors import PipelineError
from rewrite.passes.depth.ffn_fusion import FFNFusion
from rewrite.passes.depth.merge_linears import MergeLinears
from tests.passes.table import Row

from .test_parallel_block import Block

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

ROWS = [
    Row("ffn-fusion{where='0-1'}", "llama", 20, after="drop-attention{layers=1}"),
    Row("ffn-fusion", "bert", 0, near_miss={"encoder.layer.0": "its norm stands after the addition"}),
    Row("ffn-fusion", "resnet18", 0),
]


class FFN(nn.Module):
    """x + W_2 act(W_1 N x), or with a gate."""

    up: nn.Module
    down: nn.Module

    def __init__(self, gated: bool = False, act: nn.Module | None = None, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=eps) if bias else nn.RMSNorm(8, eps=eps)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)
        self.gate = nn.Linear(8, 16, bias=bias) if gated else None
        self.act = act or nn.GELU()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def f(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        hidden = self.act(self.up(n)) if self.gate is None else self.act(self.gate(n)) * self.up(n)
        return self.down(hidden)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Stack(nn.Sequential):
    """Linear in and out around some FFNs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(nn.Linear(8, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 8))

    def parallel(self, x: Tensor, *runs: tuple[int, ...]) -> Tensor:
        """Its function with the FFNs of each run side by side."""
        x, parts = self[0](x), [*self][1:-2]
        for run in runs:
            x = x + sum((parts[i].f(x) for i in run), torch.zeros(()))
        return self[-1](self[-2](x))  # type: ignore[no-any-return]


def fused(model: nn.Module, step: str) -> Any:
    return apply(model, step, args=(X,))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [True, False], ids=["layer norm", "rms norm"])
def test_fused_is_the_parallel_form(gated: bool, bias: bool) -> None:
    model = Stack(*(FFN(gated, bias=bias) for _ in range(3))).double()
    program = apply(model, "ffn-fusion{where='0-2'}", args=(X.double(),))
    expected = model.parallel(X.double(), (0, 1, 2))
    assert torch.allclose(program.module(X.double()), expected, rtol=1e-12, atol=1e-12)
    up, down = (program.module.get_submodule(f"1.{name}") for name in ("up", "down"))
    assert (up.out_features, down.in_features) == (48, 48)
    assert sorted({name.partition(".")[0] for name in program.module.state_dict()}) == ["0", "1", "4", "5"]
    promises = [(s.name, s.contract.partition(",")[0]) for s in program.history[0].steps]
    assert promises == [
        ("ffns-side-by-side", "forward close"),
        ("fold-affine", "forward same"),
        ("share-norms", "forward same"),
        ("widen-ffns", "forward same"),
    ]


def test_a_stream_that_is_flattened_before_each_ffn() -> None:
    class Flat(FFN):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, 8)
            return (rows + self.f(rows)).view(x.shape)

    model = Stack(*(Flat() for _ in range(3)))
    program = fused(model, "ffn-fusion{where='0-2'}")
    assert torch.allclose(program.module(X), model.parallel(X, (0, 1, 2)), atol=1e-5)
    assert program.module.get_submodule("1.up").out_features == 48


def test_auto_leaves_the_last_layer_alone_and_cuts_runs_at_the_window() -> None:
    model = Stack(*(FFN() for _ in range(6)))
    program = fused(model, "ffn-fusion{window=2}")
    assert torch.allclose(program.module(X), model.parallel(X, (0, 1), (2, 3), (4,), (5,)), atol=1e-4)
    assert [s.reason for s in program.history[0].skipped][:1] == ["its layer is not among those to fuse"]


@pytest.mark.parametrize(
    ("matrix", "window", "most", "expected"),
    [
        ([[0] * 5] * 5, 2, 1.0, [(0, 2), (2, 4), (4, 5)]),
        ([[0, 0.9, 0.1], [0, 0, 0.2], [0, 0, 0]], 2, 1.0, [(0, 1), (1, 3)]),
        ([[0, 0.1, 0.1], [0, 0, 0.7], [0, 0, 0]], 3, 0.5, [(0, 2), (2, 3)]),
        ([[0, 0.9], [0, 0]], 4, 0.5, [(0, 1), (1, 2)]),
    ],
)
def test_windows_are_few_and_hold_what_depends_least(matrix: Any, window: int, most: float, expected: Any) -> None:
    assert cut(matrix, window, most) == expected


def test_with_data_a_run_is_cut_where_an_ffn_depends_on_the_one_before() -> None:
    torch.manual_seed(0)
    model = Stack(*(FFN() for _ in range(4)))
    with torch.no_grad():  # what the second reads is what the first adds, and nearly nothing else
        for ffn in [*model][1:5]:
            ffn.up.weight.mul_(5)
            ffn.down.bias.zero_()
        model[1].down.weight.mul_(100)
    dropped = apply(model, [], args=(X,))
    data = [torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    matrix = rewrite.depth(dropped, data).dependency
    assert max(matrix[0][1:]) > 0.2 > max(matrix[1][2], matrix[1][3], matrix[2][3])
    program = apply(dropped, "ffn-fusion{where='0-3' dependency=0.2 bound=99}", data=data)
    assert torch.allclose(program.module(X), model.parallel(X, (0,), (1, 2, 3)), atol=1e-3)
    (measured,) = program.history[0].measured
    assert (measured.path, measured.figures["FFNs"]) == ("2", 3)
    assert measured.figures["largest"] == pytest.approx(max(matrix[1][2], matrix[1][3], matrix[2][3]), abs=1e-6)
    assert any("depends on it" in s.reason for s in program.history[0].skipped)


class ConvFFN(FFN):
    """With GPT-2's linear layers, and dropouts that are off."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up, self.down = Conv1D(16, 8), Conv1D(8, 16)
        self.off = nn.Dropout(0.0)

    def f(self, x: Tensor) -> Tensor:
        return self.off(self.down(self.off(self.act(self.up(self.norm(x))))))  # type: ignore[no-any-return]


def test_transposed_linear_layers_and_dropouts_of_rate_zero_are_fused() -> None:
    model = Stack(ConvFFN(), ConvFFN())
    program = fused(model, "ffn-fusion{where='0-1'}")
    assert torch.allclose(program.module(X), model.parallel(X, (0, 1)), atol=1e-5)
    assert tuple(program.module.get_parameter("1.up.weight").shape) == (8, 32)


def _dropout() -> nn.Module:
    ffn = FFN()
    ffn.act = nn.Sequential(nn.GELU(), nn.Dropout(0.1))
    return ffn


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (_dropout, "it has dropout"),
    "gate": (lambda: FFN(gated=True), "one is gated and the other is not"),
    "activation": (lambda: FFN(act=nn.ReLU()), "they have other activations"),
    "eps": (lambda: FFN(eps=1e-3), "they have other norms"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_to_leave_an_ffn_alone(name: str) -> None:
    make, reason = REASONS[name]
    (record,) = fused(Stack(FFN(), make()), "ffn-fusion{where='0-1'}").history
    assert not record.changed
    assert any(reason in s.reason for s in record.skipped)


def test_a_shared_ffn_and_a_sum_that_is_read_elsewhere_are_left_alone() -> None:
    class Read(Stack):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            first = self[1](self[0](x))
            return first, self[3](self[2](first))

    assert not fused(Read(FFN(), FFN()), "ffn-fusion{where='0-1'}").history[0].changed
    ffn = FFN()
    (record,) = fused(Stack(ffn, ffn), "ffn-fusion{where=0}").history
    assert not record.changed
    assert {s.reason for s in record.skipped} == {"1.up is called or held elsewhere too"}


def test_layers_that_are_none_are_refused() -> None:
    with pytest.raises(RewriteError, match="the model has FFNs in layers 0 to 1"):
        fused(Stack(FFN(), FFN()), "ffn-fusion{where=7}")
    with pytest.raises(PipelineError, match="option 'where'"):
        fused(Stack(FFN(), FFN()), "ffn-fusion{where=x}")


def test_an_ffn_beside_attention_alone_says_what_is_to_go_first() -> None:
    model = nn.Sequential(Block(), Block())
    skipped = {s.path: s.reason for s in fused(model, "ffn-fusion").history[0].skipped}
    assert "drop-attention takes out what stands between" in skipped["0"]


def test_a_model_without_a_place_says_what_it_lacks() -> None:
    assert [s.reason for s in fused(nn.Linear(8, 8), "ffn-fusion").history[0].skipped] == [FFNFusion.absence]
    assert [s.reason for s in fused(nn.Linear(8, 8), "merge-linears").history[0].skipped] == [MergeLinears.absence]
