"""Healing: which values correspond, least squares by hand, training: seeded, resumed, stopped early; its record."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import Program, RewriteError, apply, graft, heal, load, save
from rewrite.healing.losses import divergence, relative
from rewrite.healing.pairs import pairs
from tests.captures import capture

DIM = 8


class FFN(nn.Module):
    """x + W_2 gelu(W_1 N x)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Stack(nn.Sequential):
    def __init__(self, count: int = 3) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(nn.Linear(DIM, DIM), *(FFN() for _ in range(count)), nn.LayerNorm(DIM), nn.Linear(DIM, DIM))


class Named(Stack):
    """Its output is called logits."""

    def forward(self, x: Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=super().forward(x))


@functools.cache
def samples(count: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, 5, DIM, generator=generator) for _ in range(count))


@functools.cache
def original() -> Program:
    return capture(Stack().eval(), (samples()[0],))


@functools.cache
def dropped() -> Program:
    return apply(original(), "drop-ffn{layers=1}", verify=False)


def same(a: Program, b: Program) -> bool:
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("drop-ffn{layers=1}", [("add_2", "add_2", "3.down")]),
        ("ffn-fusion{where='0-1'}", [("add_1", "add", "1.down")]),
        ("ffn-fusion{where='0-2'}", [("add_2", "add", "1.down")]),
        ("dyt{where=2.norm}", [("add_1", "add_1", "2.down")]),
        ("dyt{where=4}", []),
    ],
)
def test_the_first_sum_behind_an_edit_is_paired_with_the_one_that_its_readers_read(text: str, expected: list[Any]) -> None:
    found = pairs(original(), apply(original(), text, verify=False))
    assert [(p.old.name, p.new.name, str(p.linear.target) if p.linear else "") for p in found] == expected


def test_least_squares_finds_a_layer_that_was_spoiled() -> None:
    wanted = original().module.get_parameter("2.down.weight")
    spoiled = original().clone()
    with torch.no_grad():
        spoiled.module.get_parameter("2.down.weight").add_(torch.randn(DIM, 16))
    healed = heal(spoiled, original(), samples(), steps=0)
    assert torch.allclose(healed.module.get_parameter("2.down.weight"), wanted, atol=5e-3)
    assert same(healed, heal(spoiled, original(), samples(), steps=0))
    assert not same(spoiled, healed)
    (measured,) = (m for m in healed.history[-1].measured if m.path.startswith("least squares"))
    assert measured.path == "least squares at 2.down"
    assert float(measured.figures["after"]) < 1e-2 * float(measured.figures["before"])


def test_training_wins_back_what_is_lost_and_its_record_says_how_much() -> None:
    before = dropped().module.state_dict()
    copies = {name: tensor.clone() for name, tensor in before.items()}
    healed = heal(dropped(), original(), samples(), steps=30, lr=1e-3)
    x = torch.randn(64, DIM, generator=torch.Generator().manual_seed(7))[None]
    with torch.no_grad():
        wanted = original().module.eval()(x)
        lost, left = (float(relative(p.module.eval()(x), wanted)) for p in (dropped(), healed))
    assert left < 0.5 * lost
    record = healed.history[-1]
    assert (record.name, record.text) == ("heal", "heal{steps=30 loss=mse lr=0.001}")
    assert record.verification is not None
    assert record.verification.passed
    assert {site.path for site in record.changes} == set(before)
    assert all(torch.equal(before[name], copies[name]) for name in before)
    outputs = record.measured[0]
    assert (outputs.path, float(outputs.figures["after"]) < float(outputs.figures["before"])) == ("outputs (mse)", True)


def test_equal_seeds_give_equal_results_and_the_random_state_stays() -> None:
    state = torch.get_rng_state()
    first, again, other = (heal(dropped(), original(), samples(), steps=5, seed=seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), state)


class StoppedError(Exception):
    pass


def test_one_that_was_stopped_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    file, steps = tmp_path / "healing.pt", list[str]()

    def stop(step: str) -> None:
        steps.append(step)
        if step.startswith("healing: step 12 of 20"):
            raise StoppedError

    with pytest.raises(StoppedError):
        heal(dropped(), original(), samples(), steps=20, checkpoint=file, listener=stop)
    later: list[str] = []
    resumed = heal(dropped(), original(), samples(), steps=20, checkpoint=file, listener=later.append)
    assert next(text.partition(",")[0] for text in later if "step" in text) == "healing: step 11 of 20"
    assert "s left" in steps[-1]
    assert same(resumed, heal(dropped(), original(), samples(), steps=20))
    with pytest.raises(RewriteError, match="is of another healing"):
        heal(dropped(), original(), samples(), steps=20, checkpoint=file, seed=1)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(RewriteError, match="is no checkpoint of a healing"):
        heal(dropped(), original(), samples(), steps=20, checkpoint=file)


def test_training_that_makes_it_worse_ends_early_and_leaves_what_was_best() -> None:
    healed = heal(dropped(), original(), samples(), steps=100, lr=5.0, patience=1, closed_form=False)
    record = healed.history[-1]
    assert record.options["steps taken"] == 5
    assert same(healed, dropped())
    assert [s.reason for s in record.skipped] == [
        "no step made it better on the data held back; a smaller lr, or more data, may"
    ]


def test_a_program_that_gives_the_same_is_left_alone() -> None:
    healed = heal(apply(original(), "fold-affine", verify=False), original(), samples())
    assert [s.reason for s in healed.history[-1].skipped] == ["it gives what the original gives already"]


def test_frozen_parameters_and_modes_stay_and_the_result_can_be_saved_and_grafted(tmp_path: Path) -> None:
    model = Stack().train()
    model[1].requires_grad_(False)
    program = capture(model, (samples()[0],))
    changed = apply(program, "dyt{where='*norm'}", verify=False)
    healed = heal(changed, model, samples(), steps=5)
    assert healed.module.training
    assert not any(site.path.startswith(("1.up", "1.down")) for site in healed.history[-1].changes)
    again = load(save(healed, tmp_path / "healed.pt2"))
    assert same(again, healed)
    assert again.history == healed.history
    grafted = graft(healed, model)
    assert torch.equal(grafted.get_parameter("5.weight"), healed.module.get_parameter("5.weight"))


def test_logits_are_learned_by_their_divergence() -> None:
    program = capture(Named(1).eval(), (samples()[0],))
    record = heal(apply(program, "dyt", verify=False), program, samples(), steps=5).history[-1]
    assert record.options["loss"] == "kl"
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * (torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(2 / 3)))
    assert torch.allclose(divergence(q.log(), p.log()), expected)
    assert relative(torch.zeros(4), torch.tensor([1.0, -1, 1, -1])) == 1


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "the data is empty"),
        ([torch.randn(2, 3)], {}, "item 0 of the data does not fit the model"),
        ([torch.randn(2, 5, DIM)], {"steps": -1}, "steps=-1 is out of range"),
        ([torch.randn(2, 5, DIM)], {"lr": 0.0}, "lr=0.0 is out of range"),
        ([torch.randn(2, 5, DIM)], {"loss": "l1"}, "loss is one of auto, kl, mse, not 'l1'"),
    ],
)
def test_mistakes_are_one_line(data: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        heal(dropped(), original(), data, **options)


def test_models_without_values_or_of_other_outputs_are_refused() -> None:
    with pytest.raises(RewriteError, match="heal takes a Program, not a Stack"):
        heal(Stack(), original(), samples())  # type: ignore[arg-type]
    other = capture(nn.Sequential(nn.Linear(DIM, 3)), (samples()[0],))
    with pytest.raises(RewriteError, match="outputs differ in number or shape"):
        rewrite.heal(dropped(), other, samples())
