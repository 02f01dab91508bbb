"""Capture: the program's module is the model again, in both modes, and the model is left as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewrite import RewriteError, capture
from rewrite.graph.layers import ScaledDotProductAttention
from tests.compare import (
    CAPTURED,
    OTHER,
    bytes_of,
    captured,
    capturing,
    case,
    differences,
    model_of,
    observe,
    outline,
    untouched,
)
from tests.models import stress, zoo

DEVELOPMENT = [c.name for c in zoo.development_cases()]
STRESS = [c.name for c in stress.stress_cases()]

#: Captured as it is in evaluation only: its training graph depends on the numbers drawn.
EVALUATION_ONLY = frozenset({"LayerDrop"})
REFUSED = frozenset({"DataDependentBranch"})
CAPTURABLE = [n for n in STRESS if n not in REFUSED]

#: Cases with a size that the model's code fixes: another one is an error, never a silently wrong result.
STATIC = {
    "Recurrent": (2, 20),
    "Variadic": (3, 12),
    "IntOfShape": (3, 12),
    "LoopOverLength": (2, 20),
}

#: How many parts of a case passes cannot see into, by kind.
OPAQUE = {
    "TrainingBranchInRoot": ["branch"],
    "TrainingBranchInChild": ["child.branch"],
    "OtherLayerInEval": ["train_head.branch"],
    "OtherStructureInEval": ["branch"],
    "MovingAverageInTraining": ["branch"],
    "RebindsItsBuffer": ["branch", "branch_1"],
    "BatchStatisticsByHand": ["branch"],
    "StochasticDepthByHand": ["branch_1"],
    "LayerDrop": [""],
    "NoiseInTraining": ["branch"],
    "SpectralNormParametrized": ["linear.parametrizations.weight.0.branch"],
    "SpectralNormByHook": ["linear.branch"],
    "StraightThrough": ["_RoundStraightThrough"],
    "ReversedGradient": ["_ReverseGradient"],
    "CustomFunctionInChild": ["square._ClippedSquare"],
    "NoGradient": ["no_grad"],
    "NoGradientByDecorator": ["outer.no_grad"],
    "AutocastOff": ["autocast"],
    "AutocastOn": ["fast.autocast", "autocast"],
}


def original_inputs(name: str, size: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """Inputs for the model itself: a cache is switched off, as capture does."""
    args, kwargs = case(name).inputs(*size)
    if "use_cache" in inspect.signature(model_of(name).forward).parameters:
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def found_differences(name: str, size: tuple[int, int], *, train: bool) -> list[str]:
    module = captured(name).clone().module
    expected = observe(model_of(name), *original_inputs(name, size), train=train)
    return differences(expected, observe(module, *case(name).inputs(*size), train=train))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [CAPTURED, OTHER, (1, 12)], ids=["captured", "other", "one"])
@pytest.mark.parametrize("name", DEVELOPMENT)
def test_development_model_is_its_program_bit_for_bit(name: str, size: tuple[int, int], train: bool) -> None:
    assert found_differences(name, size, train=train) == []


def test_grouped_attention_stays_causal_without_a_mask() -> None:
    """transformers builds explicit masks and repeats keys where it sees a trace; the program has the eager kernels."""
    layers = [layer for _, layer in captured("llama").layers() if isinstance(layer, ScaledDotProductAttention)]
    assert layers
    assert all(layer.is_causal and layer.enable_gqa for layer in layers)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [CAPTURED, OTHER], ids=["captured", "other"])
@pytest.mark.parametrize("name", [n for n in CAPTURABLE if n not in STATIC and n not in EVALUATION_ONLY])
def test_stress_model_is_its_program_bit_for_bit(name: str, size: tuple[int, int], train: bool) -> None:
    assert found_differences(name, size, train=train) == []


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", STATIC)
def test_model_with_a_fixed_size_is_its_program_at_that_size(name: str, train: bool) -> None:
    assert found_differences(name, CAPTURED, train=train) == []


@pytest.mark.parametrize("name", STATIC)
def test_fixed_size_is_named_and_enforced(name: str) -> None:
    program = captured(name)
    if name == "Variadic" and all(d.dynamic for d in program.dimensions if d.axis == 0):  # torch.export can since 2.14
        assert found_differences(name, STATIC[name], train=False) == []
        return
    assert any(not d.dynamic and d.reason == "the model's code fixes it" for d in program.dimensions)
    args, kwargs = case(name).inputs(*STATIC[name])
    with pytest.raises(ValueError, match="the capture fixed"):
        program.clone().module(*args, **kwargs)


@pytest.mark.parametrize("size", [CAPTURED, OTHER], ids=["captured", "other"])
def test_model_whose_training_cannot_be_exported_is_captured_in_evaluation(size: tuple[int, int]) -> None:
    assert found_differences("LayerDrop", size, train=False) == []
    program = captured("LayerDrop")
    assert program.origin.notes[0].startswith("training mode is not captured")
    assert program.opaque[0].kind == "training mode"
    assert "data-dependent" in program.opaque[0].reason


def test_data_dependent_branch_is_refused_with_the_reason_of_export() -> None:
    chosen = case("DataDependentBranch")
    with pytest.raises(RewriteError, match=r"cannot capture DataDependentBranch: .*data-dependent") as info:
        capture(chosen.build(), *chosen.inputs(*CAPTURED))
    assert len(str(info.value).splitlines()) == 1
    assert re.search(r"\(at .*stress\.py:\d+: .*if x\.sum", str(info.value))


class _Neither(nn.Module):
    """Training wants labels, evaluation branches on its data."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.training and labels is None:
            raise ValueError("labels, please")
        return x if x.sum() > 0 else -x


def test_a_model_that_neither_mode_can_be_captured_of_says_why_for_both() -> None:
    with pytest.raises(RewriteError, match=r"labels, please.*; in evaluation mode: .*data-dependent.*if x\.sum\(\)"):
        capture(_Neither(), (torch.randn(2, 5),))


def test_every_case_that_export_rejects_is_accounted_for() -> None:
    mended = {"BatchNormCumulative", "UnregisteredOutput"}
    assert mended | EVALUATION_ONLY | REFUSED == stress.REJECTED_BY_EXPORT


@pytest.mark.parametrize("name", [*DEVELOPMENT, *CAPTURABLE])
def test_state_dict_keeps_its_keys_their_order_and_its_tensors(name: str) -> None:
    model, module = model_of(name), captured(name).module
    assert list(module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in module.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", CAPTURABLE)
def test_strict_load_state_dict_from_the_model(name: str) -> None:
    model = model_of(name)
    module = captured(name).clone().module
    if all(m.get_extra_state is nn.Module.get_extra_state for m in map(type, model.modules())):
        module.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("name", [*CAPTURABLE, *DEVELOPMENT])
def test_opaque_parts_are_listed(name: str) -> None:
    assert [o.path for o in captured(name).opaque] == OPAQUE.get(name, [])
    assert all(o.reason for o in captured(name).opaque)


@pytest.mark.parametrize("name", [*CAPTURABLE, *DEVELOPMENT])
def test_capture_leaves_the_model_as_it_was(name: str) -> None:
    found = capturing(name)
    assert untouched(found.model, found.tensors)
    assert outline(found.model) == found.outline
    shared = {id(p) for p in found.program.module.parameters()}
    assert shared == {id(p) for p in found.model.parameters()}, "the program has the model's own parameters"


@pytest.mark.parametrize("name", ["Recurrent", "SpectralNormByHook", "RebindsItsBuffer", "FrozenBatchNorm"])
def test_capture_leaves_a_model_in_mixed_modes_as_it_was(name: str) -> None:
    model = model_of(name).eval()
    list(model.modules())[-1].train()
    before, flags = bytes_of(model), outline(model)
    capture(model, *case(name).inputs(*CAPTURED))
    assert untouched(model, before)
    assert outline(model) == flags


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_mode_of_each_module_is_the_models(train: bool) -> None:
    model = model_of("EncoderLayer").train(train)
    model.layer.dropout1.train(not train)
    module = capture(model, *case("EncoderLayer").inputs(*CAPTURED)).module
    assert module.training is train
    assert module.layer.dropout1.training is not train
    assert module.layer.norm1.training is train
    assert {m.training for m in module.train().modules()} == {True}
    assert {m.training for m in module.eval().modules()} == {False}


class FrozenPart(nn.Module):
    """A dropout that the user put in evaluation mode, beside one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.live = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.live(self.frozen(x))


def test_submodule_that_the_user_froze_stays_frozen() -> None:
    model = FrozenPart()
    model.frozen.eval()
    program = capture(model, (torch.randn(2, 8),))
    x = torch.randn(4, 8)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(program.module(x), expected)


@pytest.mark.parametrize("name", ["DropoutOfRateZero", "EncoderLayer"])
def test_rate_raised_after_capture_takes_effect(name: str) -> None:
    model, module = model_of(name), captured(name).clone().module
    for root in (model, module):
        for layer in root.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.4
    args, kwargs = case(name).inputs(*OTHER)
    assert differences(observe(model, args, kwargs, train=True), observe(module, args, kwargs, train=True)) == []


# -------------------- the signature -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DEVELOPMENT, *CAPTURABLE])
def test_signature_is_the_models(name: str) -> None:
    expected = inspect.signature(model_of(name).forward).parameters
    got = inspect.signature(captured(name).module.forward).parameters
    assert list(got.values()) == list(expected.values())


def test_arguments_may_be_given_by_position_or_by_name() -> None:
    (ids,), module = (torch.randint(3, 99, (2, 12)),), captured("bert").clone().module.eval()
    mask = torch.ones_like(ids)
    by_name, by_place = module(attention_mask=mask, input_ids=ids), module(ids, mask)
    assert torch.equal(by_name.last_hidden_state, by_place.last_hidden_state)


def test_default_that_was_left_open_at_capture_may_be_given() -> None:
    args, kwargs = case("KeywordOnly").inputs(*OTHER)
    module = captured("KeywordOnly").clone().module
    assert torch.equal(module(*args, **kwargs, normalize=True, power=2), module(*args, **kwargs))


def test_argument_that_the_capture_did_not_see_is_a_type_error() -> None:
    module, (_, kwargs) = captured("bert").clone().module, case("bert").inputs(*CAPTURED)
    with pytest.raises(TypeError, match=r"token_type_ids.*not given at capture"):
        module(**kwargs, token_type_ids=torch.zeros_like(kwargs["input_ids"]))
    with pytest.raises(TypeError, match="nonsense"):
        module(**kwargs, nonsense=1)
    with pytest.raises(TypeError, match=r"power.*not given at capture"):
        captured("KeywordOnly").clone().module(*_keywords()[0], **_keywords()[1], power=3)


def _keywords() -> tuple[Any, dict[str, Any]]:
    return case("KeywordOnly").inputs(*CAPTURED)


def test_missing_argument_is_an_error() -> None:
    with pytest.raises(ValueError, match="got NoneType"):
        captured("bert").clone().module(torch.randint(3, 99, (2, 12)))
    with pytest.raises(TypeError):
        captured("TiedHead").clone().module()


def test_constant_of_the_capture_is_enforced() -> None:
    args, kwargs = _keywords()
    module = capture(model_of("KeywordOnly"), args, {**kwargs, "power": 3, "normalize": True}).module
    assert torch.equal(module(*args, **kwargs, power=3), module(*args, **kwargs, power=3, normalize=True))
    with pytest.raises(ValueError, match=r"'power' was captured as 3 .*got 4"):
        module(*args, **kwargs, power=4)
    with pytest.raises(ValueError, match="'normalize' was captured as True"):
        module(*args, **kwargs, power=3, normalize=False)
    with pytest.raises(ValueError, match=r"'mask' was captured as None .*got a tensor"):
        module(*args, **{**kwargs, "mask": args[0] > 0}, power=3)


def test_constant_that_is_left_out_is_the_captures_and_the_signatures_default_is_no_exception() -> None:
    """The model's own default is 2: said in so many words it must not pass for the captured 3."""
    args, kwargs = _keywords()
    module = capture(model_of("KeywordOnly"), args, {**kwargs, "power": 3}).module
    assert torch.equal(module(*args, **kwargs), module(*args, **kwargs, power=3))
    assert inspect.signature(module.forward).parameters["power"].default == 2
    with pytest.raises(ValueError, match=r"'power' was captured as 3 .*got 2"):
        module(*args, **kwargs, power=2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_cache_is_switched_off_and_asking_for_one_is_an_error(name: str) -> None:
    module, (args, kwargs) = captured(name).clone().module.eval(), case(name).inputs(*CAPTURED)
    assert "past_key_values" not in module(*args, **kwargs)
    assert "past_key_values" not in module(*args, **kwargs, use_cache=False)
    with pytest.raises(ValueError, match="'use_cache' was captured as False"):
        module(*args, **kwargs, use_cache=True)


def test_wrong_static_size_is_an_error() -> None:
    module = captured("ChannelsFirstNorms").clone().module
    with pytest.raises(ValueError, match=r"shape \(2, 8, 7, 7\) where the capture fixed \[\*, 8, 6, 6\]"):
        module(torch.randn(2, 8, 7, 7))
    with pytest.raises(ValueError, match="the capture fixed"):
        module(torch.randn(8, 6, 6))
    with pytest.raises(ValueError, match="'ids' was captured as a tensor; got list"):
        captured("TiedHead").clone().module([[1, 2]])


def test_condition_of_the_capture_is_enforced() -> None:
    """A table of 32 positions ends there: the model fails beyond, the program says why."""
    module = captured("LengthArithmetic").clone().module
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.randn(2, stress.MAX_LENGTH + 4, stress.DIM))


# -------------------- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EncoderLayer", "TiedHead", "ChannelsFirstNorms", "LengthArithmetic", "bert", "gpt2"])
def test_example_batch_of_one_leaves_the_batch_dynamic(name: str) -> None:
    program = capture(model_of(name), *case(name).inputs(1, 12))
    assert program.dimensions[0].dynamic
    args, kwargs = original_inputs(name, OTHER)
    got = observe(program.clone().module, *case(name).inputs(*OTHER), train=False)
    assert differences(observe(model_of(name), args, kwargs, train=False), got) == []


@pytest.mark.parametrize(
    "name", ["EncoderLayer", "TiedHead", "ChannelsFirstNorms", "AttentionDropout", "DtypeLiterals", "resnet18", "bert", "t5"]
)
def test_batch_of_one_at_call(name: str) -> None:
    assert found_differences(name, (1, 12), train=False) == []


def test_dimensions_name_their_input() -> None:
    found = {(d.input, d.axis): d for d in captured("TwoLengths").dimensions}
    assert found["x", 0].dynamic
    assert found["context", 1].dynamic
    assert str(found["x", 2]) == "x[2]=8 (static: the model's code fixes it)"


# -------------------- outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_model_output_comes_back_as_its_class(name: str) -> None:
    args, kwargs = original_inputs(name, CAPTURED)
    expected = model_of(name).eval()(*args, **kwargs)
    got = captured(name).clone().module.eval()(*case(name).inputs(*CAPTURED)[0], **case(name).inputs(*CAPTURED)[1])
    assert type(got) is type(expected)
    assert list(got) == list(expected)


def test_containers_come_back_as_their_classes() -> None:
    args, _ = case("NestedContainers").inputs(*OTHER)
    got = captured("NestedContainers").clone().module(*args)
    assert list(got) == ["z", "a", "empty"]
    assert type(got["z"]) is stress.Pair
    scores = captured("DataclassIO").clone().module(*case("DataclassIO").inputs(*OTHER)[0])
    assert type(scores) is stress.Scores
    assert scores.loss is None
    loose = captured("UnregisteredOutput").clone().module(*case("UnregisteredOutput").inputs(*OTHER)[0])
    assert type(loose) is stress.Loose


def test_aliases_constants_and_none_among_the_outputs() -> None:
    (x,), _ = case("AliasedOutputs").inputs(*OTHER)
    module = captured("AliasedOutputs").clone().module
    first, weight, y, again, flat, seven, nothing = module(x)
    assert first is x
    assert weight is module.linear.weight
    assert y is again
    assert flat.data_ptr() == y.data_ptr()
    assert (seven, nothing) == (7, None)


class Oddity:
    """An object that no pytree knows."""


class ReturnsAnOddity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.linear(x), "oddity": Oddity()}


def test_dropped_outputs_are_named() -> None:
    program = capture(ReturnsAnOddity(), (torch.randn(2, 8),))
    assert [n for n in program.origin.notes if "output.oddity (Oddity) is dropped" in n]
    assert list(program.module(torch.randn(3, 8))) == ["y"]
    assert program.module.interface.dropped_outputs == ("output.oddity (Oddity)",)


def test_input_that_the_model_writes_is_written() -> None:
    (x,), _ = case("MutatesItsInput").inputs(*OTHER)
    captured("MutatesItsInput").clone().module(x)
    assert float(x.min()) == 0


# -------------------- copies, notes, refusals ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "RMSNormSpellings",
        "SharedUnderTwoNames",
        "SpectralNormByHook",
        "StraightThrough",
        "Recurrent",
        "DeviceLiterals",
        "ConstantAttribute",
        "AutocastOn",
    ],
)
def test_deepcopy_is_independent_and_equal(name: str) -> None:
    module = captured(name).clone().module
    copied = copy.deepcopy(module)
    args, kwargs = case(name).inputs(*CAPTURED)
    assert {p.data_ptr() for p in copied.parameters()}.isdisjoint({p.data_ptr() for p in module.parameters()})
    expected = observe(module, args, kwargs, train=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert differences(expected, observe(copied, args, kwargs, train=True)) == []


def test_ties_survive_a_deepcopy() -> None:
    module = copy.deepcopy(captured("TiedHead").module)
    assert module.head.weight is module.embedding.weight
    shared = copy.deepcopy(captured("SharedUnderTwoNames").module)
    assert shared.second.again is shared.first
    assert shared.second.norm is shared.first.get_submodule("1")


@pytest.mark.parametrize("write", [pickle.dumps, lambda m: torch.save(m, "/dev/null")], ids=["pickle", "torch.save"])
def test_pickling_is_refused_with_one_line_that_names_the_way_out(write: Any) -> None:
    with pytest.raises(RewriteError, match=r"rewrite\.save.*rewrite\.graft") as info:
        write(captured("TiedHead").module)
    assert "\n" not in str(info.value)


def test_checkpointing_is_noted() -> None:
    assert any("checkpointing" in note for note in captured("Checkpointed").origin.notes)
    assert captured("TiedHead").origin.notes == ()


class _Reentrant(nn.Module):
    """The older kind of checkpoint runs its region without gradient, and again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda v: torch.tanh(self.inner(v)), self.stem(x), use_reentrant=True))


def test_a_reentrant_checkpoint_keeps_its_gradient() -> None:
    model, x = _Reentrant(), torch.randn(3, 4)
    program = capture(model, (x,))
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    program.module(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, program.module.parameters(), strict=True))
    assert program.opaque == ()
    assert any("checkpointing" in note for note in program.origin.notes)


def test_origin_says_what_was_captured() -> None:
    origin = captured("TiedHead").origin
    assert origin.model_class == "tests.models.stress.TiedHead"
    assert origin.parameter_shapes["head.weight"] == (stress.VOCAB, stress.DIM)
    assert set(origin.seconds) == {"export", "check", "lift"}


def test_lstm_in_float32_is_trained_with_its_dropout() -> None:
    args, kwargs = case("Recurrent").inputs(*CAPTURED)
    module = captured("Recurrent").clone().module
    first = observe(module, args, kwargs, train=True, seed=1)
    assert not torch.equal(first.outputs[0], observe(module, args, kwargs, train=True, seed=2).outputs[0])


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (3, (), "capture takes an nn.Module, not int"),
        (nn.Linear(2, 2), torch.ones(2, 2), "args must be a tuple"),
        (nn.Linear(2, 2), (), "the inputs do not fit Linear.forward: missing a required argument: 'input'"),
    ],
)
def test_wrong_arguments_of_capture(model: Any, args: Any, message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        capture(model, args)


def test_a_programs_own_module_is_refused() -> None:
    with pytest.raises(RewriteError, match="program's module already"):
        capture(captured("TiedHead").module, case("TiedHead").inputs(*CAPTURED)[0])


def test_model_that_cannot_be_copied_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.lock = __import__("threading").Lock()
    with pytest.raises(RewriteError, match="Linear cannot be copied"):
        capture(model, (torch.ones(2, 2),))
