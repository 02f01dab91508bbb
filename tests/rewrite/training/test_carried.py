"""An optimizer's state, carried to larger parameters: worked out by hand, and training on as one that began there."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import SAME, Contract, Pass, Program, RewriteError, expand_state
from rewrite.pipeline.context import Context
from tests.captures import capture


class Block(nn.Module):
    """x + down(act(up(norm(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


@dataclass(frozen=True)
class Twice(Pass):
    """Each unit two times, of which the second layer reads each by half: W1' = [W1; W1], W2' = [W2, W2] / 2."""

    name = "twice"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        for path in ("up.weight", "up.bias"):
            context.edit.set_parameter(path, lambda w: torch.cat([w, w]), path)
        context.edit.set_parameter("down.weight", lambda w: torch.cat([w, w], 1) / 2, "down.weight")


def trained(module: nn.Module, named: bool = False) -> tuple[torch.optim.AdamW, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 5, 6)
    optimizer = torch.optim.AdamW(module.named_parameters() if named else module.parameters(), lr=1e-2)
    for _ in range(3):
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, x


def pair(passes: str | Pass, named: bool = False) -> tuple[torch.optim.AdamW, Program, Program]:
    torch.manual_seed(0)
    model = Block().train()
    optimizer, x = trained(model, named)
    old = capture(model, (x,))
    return optimizer, old, rewrite.apply(old, passes, verify=False)


@pytest.mark.parametrize("named", [False, True])
def test_moments_follow_their_entries_and_new_ones_are_zero(named: bool) -> None:
    optimizer, old, new = pair("expand{ffn=+3}", named)
    made = expand_state(optimizer.state_dict(), old, new)
    order = [name for name, _ in new.module.named_parameters()]
    before, after = optimizer.state_dict()["state"], made["state"]
    up, down = order.index("up.weight"), order.index("down.weight")
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[up][key][:8], before[up][key])
        assert torch.equal(after[down][key][:, :8], before[down][key])
        assert not after[up][key][8:].any()
        assert after[up][key].dtype == torch.float32
    assert after[up]["step"] == 3
    fresh = torch.optim.AdamW(new.module.named_parameters() if named else new.module.parameters(), lr=1e-2)
    fresh.load_state_dict(made)
    new.module(torch.randn(4, 5, 6)).square().mean().backward()
    fresh.step()


def test_moments_of_copies_are_those_of_their_gradients() -> None:
    optimizer, old, new = pair(Twice())
    made = expand_state(optimizer.state_dict(), old, new)
    order = [name for name, _ in new.module.named_parameters()]
    x = torch.randn(4, 5, 6)
    gradients = {}
    for which, program in (("old", old), ("new", new)):
        program.module(x).square().mean().backward()
        gradients[which] = {name: p.grad for name, p in program.module.named_parameters()}
    for i, name in enumerate(order):
        small, large = gradients["old"][name], gradients["new"][name]
        assert small is not None
        assert large is not None
        reached = optimizer.state_dict()["state"][i]["exp_avg"]
        ratio = (large.flatten()[0] / small.flatten()[0]).item()
        assert made["state"][i]["exp_avg"].flatten()[0].item() == pytest.approx(
            ratio * reached.flatten()[0].item(), rel=1e-4
        )
        squares = optimizer.state_dict()["state"][i]["exp_avg_sq"].flatten()[0].item()
        assert made["state"][i]["exp_avg_sq"].flatten()[0].item() == pytest.approx(ratio**2 * squares, rel=1e-4)


def test_several_passes_and_groups_by_name() -> None:
    torch.manual_seed(0)
    model = Block()
    heavy = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    light = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": heavy}, {"params": light, "weight_decay": 0.0}])
    model(torch.randn(4, 5, 6)).sum().backward()
    optimizer.step()
    old = capture(model, (torch.randn(4, 5, 6),))
    new = rewrite.apply(old, "expand{ffn=2x},expand{ffn=+1}", verify=False)
    made = expand_state(optimizer.state_dict(), old, new)
    assert [group["param_names"] for group in made["param_groups"]] == [[n for n, _ in heavy], [n for n, _ in light]]
    assert [tuple(made["state"][i]["exp_avg"].shape) for i in range(2)] == [(17, 6), (6, 17)]
    nameless = {**optimizer.state_dict(), "param_groups": [{"params": [0, 1]}, {"params": [2, 3, 4, 5]}]}
    with pytest.raises(RewriteError, match="2 groups and no names"):
        expand_state(nameless, old, new)


def test_programs_that_are_no_kin_are_refused() -> None:
    optimizer, old, new = pair("expand{ffn=2x}")
    with pytest.raises(RewriteError, match="was not made of the first"):
        expand_state(optimizer.state_dict(), new, old)
    with pytest.raises(RewriteError, match="the state is of 3 parameters"):
        expand_state({"state": {}, "param_groups": [{"params": [0, 1, 2]}]}, old, new)


def test_layers_that_are_new_start_without_a_state_and_others_follow_their_numbers() -> None:
    torch.manual_seed(0)
    model = Stack().train()
    optimizer, x = trained(model)
    old = capture(model, (x,))
    new = rewrite.apply(old, "expand{layers=+1 ffn=+2}", verify=False)
    made = expand_state(optimizer.state_dict(), old, new)
    order = [name for name, _ in new.module.named_parameters()]
    has = [name for i, name in enumerate(order) if i in made["state"]]
    assert len(order) == len(made["param_groups"][0]["params"]) == 20
    assert len(has) == len(optimizer.state_dict()["state"]) == 14
    last = list(dict(model.named_parameters())).index("blocks.1.up.weight")
    now = max(name for name in has if name.endswith("up.weight"))
    found = made["state"][order.index(now)]["exp_avg"]
    assert torch.equal(found[:8], optimizer.state_dict()["state"][last]["exp_avg"])
