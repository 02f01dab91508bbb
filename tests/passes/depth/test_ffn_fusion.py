"""ffn-fusion: the models the kit tries it on, the wide FFN by hand, runs and windows, and each reason to leave one alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError, apply
from rewrite.analysis.windows import cut
from rewrite.errors import PipelineError
from rewrite.graph.regions import Region
from rewrite.passes.depth.ffn_fusion import FFNFusion
from rewrite.passes.depth.merge_linears import MergeLinears
from rewrite.passes.depth.stochastic_depth import StochasticDepth
from tests.passes.table import Row

from .test_parallel_block import Block

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

ROWS = [
    Row("ffn-fusion{where='0-1'}", "llama", 20, after="drop-attention{layers=1}"),
    Row("ffn-fusion{where='0-1'}", "gpt2", 19, after="drop-attention{layers=1}"),
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


class Packed(FFN):
    """Gate and up are the halves of one projection, which comes in the order that is asked for."""

    def __init__(self, gate: int = 0, bias: bool = True) -> None:
        super().__init__(bias=bias)
        self.up, self.place = nn.Linear(8, 32, bias=bias), gate

    def f(self, x: Tensor) -> Tensor:
        pair = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(self.act(pair[self.place]) * pair[1 - self.place])  # type: ignore[no-any-return]


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gate_and_up_in_one_are_stacked_by_halves(gate: int, bias: bool) -> None:
    model = Stack(*(Packed(gate, bias) for _ in range(3))).double()
    program = apply(model, "ffn-fusion{where='0-2'}", args=(X.double(),))
    assert torch.allclose(program.module(X.double()), model.parallel(X.double(), (0, 1, 2)), rtol=1e-12, atol=1e-12)
    assert program.module.get_submodule("1.up").out_features == 96
    assert program.history[-1].steps[-1].contract == "forward same, backward same"


class Dropping(FFN):
    """With dropout of the hidden units, and of what is added."""

    def __init__(self, inner: float = 0.0, outer: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.outer = nn.Dropout(inner), nn.Dropout(outer)

    def f(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        hidden = self.act(self.up(n)) if self.gate is None else self.inner(self.act(self.gate(n))) * self.up(n)
        return self.down(self.inner(hidden))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.f(x))  # type: ignore[no-any-return]


class OneForAll(Dropping):
    """With one dropout for all FFNs of a model, inside and behind."""

    dropout = nn.Dropout(0.4)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.outer = self.dropout


class ByFunction(FFN):
    """With a functional dropout behind."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.f(x), 0.2, self.training)


def last_step(program: rewrite.Program) -> str:
    return program.history[-1].steps[-1].contract


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dropping(0.1, 0.3),
        lambda: Dropping(0.0, 0.3, gated=True, bias=False),
        OneForAll,
        ByFunction,
    ],
    ids=["inside and behind", "behind", "one module for all", "function"],
)
def test_with_dropout_evaluation_is_the_parallel_form_and_training_another_draw(make: Callable[[], FFN]) -> None:
    model = Stack(make(), make(), make())
    program = fused(model, "ffn-fusion{where='0-2'}")
    expected = model.eval().parallel(X, (0, 1, 2))
    assert torch.allclose(program.module.eval()(X), expected, atol=1e-5)
    assert last_step(program) == "forward same, backward same, evaluation only"
    assert not torch.allclose(program.module.train()(X), expected, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_of_hidden_units_alone_is_held_in_training_too(gated: bool) -> None:
    model = Stack(Dropping(0.1, gated=gated), Dropping(0.1, gated=gated))
    program = fused(model, "ffn-fusion{where='0-1'}")
    assert last_step(program) == "forward same, backward same"
    checks = program.history[-1].steps[-1].verification.checks  # type: ignore[union-attr]
    assert any("in training" in check.detail for check in checks)


def test_one_draw_drops_units_of_the_sum() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Dropping(0.0, 0.5), Dropping(0.0, 0.5)).eval()
    program = fused(model, "ffn-fusion{where='0-1'}")
    x = model[0](X)
    added, total = program.module.train()(X) - x, model[1].f(x) + model[2].f(x)
    kept = (added - 2 * total).abs() < 1e-4
    assert bool((kept | (added.abs() < 1e-6)).all())
    assert 0.3 < float(kept.double().mean()) < 0.7


def test_a_fused_ffn_with_dropout_is_trained_and_read_back(tmp_path: Path) -> None:
    program = fused(Stack(Dropping(0.1, 0.3), Dropping(0.1, 0.3)), "ffn-fusion{where='0-1'}")
    rewrite.save(program, tmp_path / "fused.pt2")
    again = rewrite.load(tmp_path / "fused.pt2").module
    assert torch.equal(again.eval()(X), program.module.eval()(X))
    optimizer = torch.optim.SGD(again.train().parameters(), 0.1)
    before = again.get_parameter("1.up.weight").clone()
    again(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(again.get_parameter("1.up.weight"), before)
    assert {type(layer).__name__ for _, layer in program.layers()} >= {"Dropout"}


class ByMode(nn.Module):
    """What the code of a model does in training alone."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x) if self.training else x


def floored(x: Tensor) -> Tensor:
    """Stochastic depth of rate a half as transformers has it."""
    return x.div(0.5) * (0.5 + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)).floor()


def _by_timm(rate: float) -> nn.Module:
    from timm.layers import DropPath

    return DropPath(rate)


def _by_torchvision(rate: float) -> nn.Module:
    from torchvision.ops import StochasticDepth as Theirs

    return Theirs(rate, "row")


def _left_out(layer: nn.Module) -> Dropping:
    ffn = Dropping()
    ffn.outer = layer  # type: ignore[assignment]
    return ffn


DEPTHS: dict[str, Callable[[float], nn.Module]] = {
    "of the pass": StochasticDepth,
    "of timm": _by_timm,
    "of torchvision": _by_torchvision,
}


@pytest.mark.parametrize("make", [*DEPTHS.values(), lambda _: ByMode(floored)], ids=[*DEPTHS, "of transformers"])
def test_one_draw_leaves_the_sum_out_sample_by_sample(make: Callable[[float], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), _left_out(make(0.5)), _left_out(make(0.5))).eval()
    program = fused(model, "ffn-fusion{where='0-1'}")
    assert last_step(program) == "forward same, backward same, evaluation only"
    samples = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(1))
    x = model[0](samples)
    total = model[1].f(x) + model[2].f(x)
    assert torch.allclose(program.module.eval()(samples), x + total, atol=1e-5)
    added = program.module.train()(samples) - x
    kept = (added - 2 * total).abs().amax((1, 2)) < 1e-4
    left = added.abs().amax((1, 2)) < 1e-5
    assert bool((kept ^ left).all())
    assert 16 < int(kept.sum()) < 48


@pytest.mark.parametrize("make", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("second", [0.2, 0.0])
def test_stochastic_depth_of_other_rates_is_left_alone(make: Callable[[float], nn.Module], second: float) -> None:
    (record,) = fused(Stack(_left_out(make(0.5)), _left_out(make(second))), "ffn-fusion{where='0-1'}").history
    assert not record.changed
    assert any("they have stochastic depth of other rates, or one has none" in s.reason for s in record.skipped)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 0.1 * torch.randn_like(x),
        lambda x: x * x.mean(-1, keepdim=True),
        lambda x: 0.5 / x,
        lambda x: x.mul(2).clamp(max=1),
    ],
    ids=["noise", "a factor by the values", "a quotient", "bent"],
)
def test_what_is_changed_in_training_by_more_than_a_factor_is_left_alone(change: Callable[[Tensor], Tensor]) -> None:
    (record,) = fused(Stack(*(_left_out(ByMode(change)) for _ in range(2))), "ffn-fusion{where='0-1'}").history
    assert not record.changed
    assert any("changed in training by more than a factor" in s.reason for s in record.skipped)


def test_a_fused_ffn_with_stochastic_depth_is_trained_and_read_back(tmp_path: Path) -> None:
    program = fused(Stack(*(_left_out(_by_timm(0.5)) for _ in range(3))), "ffn-fusion{where='0-2'}")
    assert sum(isinstance(layer, Region) for _, layer in program.layers()) == 1
    rewrite.save(program, tmp_path / "fused.pt2")
    again = rewrite.load(tmp_path / "fused.pt2").module
    assert torch.equal(again.eval()(X), program.module.eval()(X))
    again.train()(X).square().mean().backward()
    assert all(p.grad is not None for p in again.parameters())


SIZES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16},
    "OPT": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "T5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 3, "decoder_start_token_id": 0},
}


@pytest.mark.parametrize("name", SIZES)
def test_models_with_the_dropout_of_their_defaults(name: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=32, bos_token_id=1, eos_token_id=1, **SIZES[name])
    assert 0.1 in config.to_dict().values()
    model = getattr(transformers, f"{name}Model")(config).eval()
    tokens = torch.arange(2, 12).reshape(2, 5)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name == "T5" else {})
    pipeline = "drop-attention{layers=1-2 bound=9},ffn-fusion{where='0-2' bound=9}"
    program = rewrite.apply(model, pipeline, kwargs=inputs)
    assert last_step(program) == "forward same, backward same, evaluation only"
    rewrite.save(program, tmp_path / "fused.pt2")
    again = rewrite.load(tmp_path / "fused.pt2").module
    assert torch.equal(again.eval()(**inputs)[0], program.module.eval()(**inputs)[0])
    again.train()(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None for p in again.parameters())


def _early() -> nn.Module:
    ffn = FFN()
    ffn.norm = nn.Sequential(ffn.norm, nn.Dropout(0.0))  # type: ignore[assignment]
    return ffn


def _alpha() -> nn.Module:
    ffn = FFN()
    ffn.act = nn.Sequential(nn.GELU(), nn.AlphaDropout(0.1))
    return ffn


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout inside": (lambda: Dropping(0.1), "they have dropout of other rates"),
    "dropout behind": (lambda: Dropping(0.0, 0.1), "they have dropout of other rates"),
    "dropout before": (_early, "it has dropout before its first projection"),
    "alpha dropout": (_alpha, "it is more than two or three projections and an activation"),
    "stochastic depth": (lambda: _left_out(StochasticDepth(0.1)), "they have stochastic depth of other rates"),
    "gate": (lambda: FFN(gated=True), "one is gated, or has gate and up in one"),
    "activation": (lambda: FFN(act=nn.ReLU()), "they have other activations"),
    "eps": (lambda: FFN(eps=1e-3), "they have other norms"),
}


def test_gate_and_up_in_another_order_are_left_alone() -> None:
    (record,) = fused(Stack(Packed(0), Packed(1)), "ffn-fusion{where='0-1'}").history
    assert not record.changed
    assert any("gate and up in another order" in s.reason for s in record.skipped)


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
