"""stochastic-depth: the models the kit tries it on, its rates, one draw a sample, the expectation, evaluation as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, apply
from rewrite.errors import PipelineError
from tests.passes.table import Row

from .test_ffn_fusion import FFN

X = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(0))

ROWS = [
    Row("stochastic-depth{where=h.0.attn}", "gpt2", 2, near_miss={"h.1.mlp": "not selected"}),
    Row("stochastic-depth{decay=uniform}", "ResidualConvolutions", {"bn2_depth"}),
    Row("stochastic-depth", "TiedHead", 0),
]


def dropped(step: str, *layers: nn.Module) -> Program:
    return apply(nn.Sequential(nn.Linear(8, 8), *layers), step, args=(X,))


def rates(program: Program) -> list[float]:
    return [layer.p for node, layer in program.layers() if str(node.target).endswith("_depth")]  # type: ignore[misc]


def test_rates_rise_with_depth_or_stay() -> None:
    stack = [FFN() for _ in range(4)]
    assert rates(dropped("stochastic-depth{rate=0.4}", *stack)) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates(dropped("stochastic-depth{rate=0.4 decay=uniform}", *stack)) == [0.4] * 4


def test_each_sample_keeps_the_branch_divided_by_what_is_kept_or_loses_it() -> None:
    ffn = FFN()
    program = dropped("stochastic-depth{rate=0.25}", ffn)
    start: Tensor = program.module.get_submodule("0")(X)
    torch.manual_seed(0)
    added = (program.module.train()(X) - start).detach()
    branch = ffn.f(start).detach()
    lost = added.abs().amax((1, 2)) == 0
    assert 4 < int(lost.sum()) < 32
    torch.testing.assert_close(added[~lost], branch[~lost] / 0.75, atol=1e-5, rtol=1e-5)
    assert torch.equal(program.module.eval()(X), nn.Sequential(program.module.get_submodule("0"), ffn)(X))


def test_a_second_run_and_stochastic_depth_of_the_models_own_are_left_alone() -> None:
    class Own(FFN):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x + self.f(x)
            kept = torch.bernoulli(torch.full((x.shape[0], 1, 1), 0.9))
            return x + self.f(x) * kept / 0.9

    again = apply(dropped("stochastic-depth", FFN()), "stochastic-depth")
    for program in (again, dropped("stochastic-depth", Own())):
        assert [s.reason for s in program.history[-1].skipped] == ["it is left out at random already"]


def test_a_rate_of_one_is_refused() -> None:
    with pytest.raises(PipelineError, match="option 'rate'"):
        dropped("stochastic-depth{rate=1}", FFN())
