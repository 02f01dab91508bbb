"""Whose tensors are whose: nothing that apply, verify and lower were given is ever written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewrite import Program, apply, capture, lower, verify
from rewrite.graph.program import tensors_of
from tests.compare import CAPTURED, bytes_of, captured, case, model_of, outline, untouched

NAMES = ["vit", "EncoderLayer", "RMSNormSpellings", "FrozenBatchNorm", "TiedHead", "SharedUnderTwoNames"]


def pointers(program: Program) -> dict[str, int]:
    module = program.module
    return {n: t.data_ptr() for n, t in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]}


def fresh(name: str) -> tuple[nn.Module, Program]:
    model = model_of(name)
    return model, capture(model, *case(name).inputs(*CAPTURED))


@pytest.mark.parametrize("share", [False, True], ids=["own", "share"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "FrozenBatchNorm"])
def test_apply_writes_neither_model_nor_program(name: str, share: bool) -> None:
    program = captured(name)
    before, code, flags = bytes_of(program.module), program.module.code, outline(program.module)
    result = apply(program, "dyt", share=share)
    assert untouched(program.module, before)
    assert outline(program.module) == flags
    assert program.module.code == code
    assert program.history == ()
    assert len(result.history) == 1


def test_apply_leaves_the_model_it_captures_as_it_was() -> None:
    model = model_of("EncoderLayer")
    before, flags = bytes_of(model), outline(model)
    apply(model, "dyt", *case("EncoderLayer").inputs(*CAPTURED))
    assert untouched(model, before)
    assert outline(model) == flags


@pytest.mark.parametrize("name", NAMES)
def test_verify_writes_nothing(name: str) -> None:
    model, program = fresh(name)
    copied = program.clone()
    before = bytes_of(model), bytes_of(program.module), bytes_of(copied.module)
    state = torch.get_rng_state()
    assert verify(program, copied).bitwise
    assert untouched(model, before[0])
    assert untouched(program.module, before[1])
    assert untouched(copied.module, before[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["FrozenBatchNorm", "SpectralNormParametrized", "TiedHead"])
def test_lower_writes_nothing(name: str) -> None:
    model, program = fresh(name)
    before, flags = bytes_of(model), outline(program.module)
    args, kwargs = case(name).inputs(*CAPTURED)
    lowered: Any = lower(program, "eager")
    lowered(*args, **kwargs)
    assert untouched(model, before)
    assert outline(program.module) == flags


@pytest.mark.xdist_group("EncoderLayer")
def test_result_has_tensors_of_its_own() -> None:
    program = captured("EncoderLayer")
    result = apply(program, "dyt")
    ours = {t.data_ptr() for t in tensors_of(program.module)}
    assert ours.isdisjoint({t.data_ptr() for t in tensors_of(result.module)})


@pytest.mark.xdist_group("EncoderLayer")
def test_share_shares_what_no_edit_touched() -> None:
    program = captured("EncoderLayer")
    result = apply(program, "dyt{where=layer.norm1}", share=True)
    old, new = pointers(program), pointers(result)
    assert new.keys() - old.keys() == {"layer.norm1.alpha"}
    assert {n for n in old if new[n] != old[n]} <= {"layer.norm1.weight", "layer.norm1.bias"}
    assert result.module.get_submodule("layer.linear1").weight is program.module.get_submodule("layer.linear1").weight


@pytest.mark.xdist_group("TiedHead")
def test_without_passes_apply_is_a_copy() -> None:
    program = captured("TiedHead")
    copied = apply(program, [])
    assert copied is not program
    assert set(pointers(copied).values()).isdisjoint(pointers(program).values())
    assert apply(program, [], share=True).module.head.weight is program.module.head.weight


@pytest.mark.xdist_group("EncoderLayer")
def test_training_a_result_leaves_the_input_alone() -> None:
    program = captured("EncoderLayer")
    before = bytes_of(program.module)
    result = apply(program, "dyt").module.train()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        result(*case("EncoderLayer").inputs(*CAPTURED)[0]).square().mean().backward()
        optimizer.step()
    assert untouched(program.module, before)


def test_example_inputs_are_not_written() -> None:
    program = captured("MutatesItsInput")
    before = program.example_args[0].clone()
    verify(program, program.clone())
    apply(program, [])
    assert torch.equal(program.example_args[0], before)
    assert float(before.min()) < 0


@pytest.mark.xdist_group("TiedHead")
def test_clone_keeps_ties() -> None:
    for share in (False, True):
        module = captured("TiedHead").clone(share=share).module
        assert module.head.weight is module.embedding.weight
