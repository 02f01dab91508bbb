"""The proof of a pass: each way of breaking one's word is caught, and what is right passes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rewrite import Contract, Pass, Program, apply
from rewrite.graph.nodes import aten
from rewrite.numerics.compare import same_bytes
from rewrite.numerics.probes import fresh_inputs, perturbed
from rewrite.pipeline.context import Context
from rewrite.pipeline.crash import VerificationError
from rewrite.pipeline.registry import as_passes
from rewrite.proof.contract import CLOSE, NEW, SAME
from rewrite.proof.kept import _unnamed
from tests.captures import capture, shared
from tests.compare import bytes_of, outline, untouched

DIM = 8
KEPT = Contract(forward=SAME, backward=SAME)
OTHER = Contract(forward=NEW, backward=NEW)


class Net(nn.Module):
    """A linear layer, a norm, dropout, a head; a tie and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(DIM, DIM)
        self.third = nn.Linear(DIM, DIM)
        self.third.weight = self.second.weight
        self.register_buffer("scale", torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.drop(self.norm(self.first(x)))) * self.scale)


def program() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(4, DIM),))


class EqualLinear(nn.Module):
    """x Wᵀ + b, written as a sum of products."""

    def __init__(self, old: nn.Linear, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = old.weight, old.bias
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


Run = Callable[[Program, Context], None]


@dataclass(frozen=True)
class Probe(Pass):
    """Do what the test says, under the contract the test says."""

    name = "probe"
    action: ClassVar[Run]
    promise: ClassVar[Contract] = KEPT

    def contract(self) -> Contract:
        return type(self).promise

    def run(self, program: Program, context: Context) -> None:
        type(self).action(program, context)


def probe(action: Run, promise: Contract = KEPT, reference: Any = None) -> Pass:
    body: dict[str, Any] = {"action": staticmethod(action), "promise": promise, "name": "probe", "__doc__": "A probe."}
    if reference is not None:
        body["reference"] = lambda self, old, new, *inputs: reference(old, new, *inputs)
    made: Pass = dataclass(frozen=True)(type("Made", (Probe,), body))()
    return made


def refused(action: Run, tmp_path: Path, promise: Contract = KEPT, reference: Any = None) -> VerificationError:
    before = program()
    state, flags, code = bytes_of(before.module), outline(before.module), before.module.code
    with pytest.raises(VerificationError) as info:
        apply(before, probe(action, promise, reference), crash_folder=tmp_path)
    assert untouched(before.module, state), "the input is left as it was"
    assert outline(before.module) == flags
    assert before.module.code == code
    assert "probe broke its contract" in str(info.value)
    return info.value


def checks(error: VerificationError) -> dict[str, dict[str, Any]]:
    assert error.bundle is not None
    return {c["name"]: c for c in json.loads((error.bundle / "bundle.json").read_text())["checks"]}


def failed(error: VerificationError) -> list[str]:
    return [name for name, check in checks(error).items() if not check["passed"]]


def swap(path: str, make: Callable[[Any], nn.Module]) -> Run:
    def action(program: Program, context: Context) -> None:
        context.edit.replace_layer(path, make(program.module.get_submodule(path)))

    return action


# -------------------- broken words ---------------------------------------------------------------------------


def test_another_function_under_the_promise_of_the_same(tmp_path: Path) -> None:
    error = refused(swap("first", lambda old: EqualLinear(old, 1.0 + 1e-6)), tmp_path)
    assert failed(error) == ["same"]


def test_another_gradient_under_the_promise_of_the_same(tmp_path: Path) -> None:
    class Detached(EqualLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.bias - self.bias.detach())

    error = refused(swap("first", Detached), tmp_path)
    assert failed(error) == ["same"]


def test_another_training_mode_under_the_promise_of_the_same(tmp_path: Path) -> None:
    error = refused(swap("drop", lambda old: nn.Identity()), tmp_path)
    assert failed(error) == ["same"]


def test_parameter_outside_of_the_edits(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", EqualLinear)(program, context)
        with torch.no_grad():
            program.module.second.bias.add_(1)

    assert "kept" in failed(refused(action, tmp_path))


def test_buffer_outside_of_the_edits(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", EqualLinear)(program, context)
        program.module.scale = torch.full((DIM,), 2.0)

    assert "kept" in failed(refused(action, tmp_path))


def test_parameter_changed_without_any_edit(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        with torch.no_grad():
            program.module.second.bias.add_(1)

    assert "kept" in failed(refused(action, tmp_path))


def test_key_without_an_edit_that_explains_it(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", EqualLinear)(program, context)
        program.module.second.register_parameter("extra", nn.Parameter(torch.ones(1)))

    error = refused(action, tmp_path)
    assert "second.extra has no edit" in checks(error)["kept"]["detail"]


def test_layer_swapped_behind_the_editors_back(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        program.module.norm = nn.RMSNorm(DIM)

    assert failed(refused(action, tmp_path))


def test_hidden_layer_swap_beside_a_journaled_one(tmp_path: Path) -> None:
    """What the journal names is accounted for; the rest differs from the input."""

    def action(program: Program, context: Context) -> None:
        swap("norm", lambda old: nn.RMSNorm(DIM))(program, context)
        program.module.drop = nn.Dropout(0.9)

    error = refused(action, tmp_path, OTHER, lambda old, new, x: nn.functional.rms_norm(x, (DIM,), new.weight, None))
    assert failed(error) == ["frame"]


def test_hidden_rewiring_of_the_graph(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("norm", lambda old: nn.RMSNorm(DIM))(program, context)
        second = next(n for n, _ in program.layers() if n.target == "second")
        second.replace_input_with(second.args[0], second.args[0].args[0])

    error = refused(action, tmp_path, OTHER, lambda old, new, x: nn.functional.rms_norm(x, (DIM,), new.weight, None))
    assert failed(error) == ["frame"]


def test_hidden_edit_alone(tmp_path: Path) -> None:
    """An edit that no journal names, and no other: the engine sees by itself that the graph changed."""

    def action(program: Program, context: Context) -> None:
        second = next(n for n, _ in program.layers() if n.target == "second")
        second.replace_input_with(second.args[0], second.args[0].args[0])

    assert failed(refused(action, tmp_path))


@pytest.mark.parametrize("factor", [1.0 + 1e-6, math.nan], ids=["close", "nan"])
def test_layer_that_is_not_what_the_formula_says(tmp_path: Path, factor: float) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", lambda old: EqualLinear(old, factor))(program, context)

    error = refused(action, tmp_path, OTHER, lambda old, new, x: x @ new.weight.t() + new.bias)
    assert failed(error) == ["formula"]


def test_layer_whose_gradient_is_not_the_formulas(tmp_path: Path) -> None:
    class Detached(EqualLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    error = refused(swap("first", Detached), tmp_path, OTHER, lambda old, new, x: x @ new.weight.t() + new.bias)
    assert "formula" in failed(error)


def test_pass_without_a_formula_has_nothing_to_be_checked_by(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"formula: .*pass probe gives no formula of what it inserts"):
        apply(program(), probe(swap("norm", lambda old: nn.RMSNorm(DIM)), OTHER), crash_folder=tmp_path)


def test_broken_tie(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", EqualLinear)(program, context)
        program.module.third.weight = nn.Parameter(program.module.third.weight.detach().clone())

    assert "tied weights" in failed(refused(action, tmp_path))


def test_another_output_shape(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        output = program.graph.output_node()
        last = output.all_input_nodes[0]
        output.replace_input_with(last, context.edit.insert_function(aten.sum.dim_IntList, [last, [-1]], after=last))

    assert "outputs" in failed(refused(action, tmp_path))


def test_another_output_dtype(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        output = program.graph.output_node()
        last = output.all_input_nodes[0]
        output.replace_input_with(last, context.edit.insert_function(aten.to.dtype, [last, torch.float64], after=last))

    assert "outputs" in failed(refused(action, tmp_path))


def test_another_number_of_outputs(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        output = program.graph.output_node()
        output.args = ((*output.args[0], output.args[0][0]),)

    assert "outputs" in failed(refused(action, tmp_path))


def test_another_signature(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", EqualLinear)(program, context)
        other = capture(nn.Identity(), (torch.randn(4, DIM),)).module.interface
        program.module.__dict__["interface"] = dataclasses.replace(program.module.interface, signature=other.signature)

    assert "signature" in failed(refused(action, tmp_path))


def test_metadata_that_is_not_what_a_node_computes(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", EqualLinear)(program, context)
        first = next(n for n, _ in program.layers() if n.target == "first")
        first.meta["val"] = first.meta["val"].double()

    assert "values" in failed(refused(action, tmp_path))


# -------------------- the crash bundle -----------------------------------------------------------------------


def test_crash_bundle_holds_what_one_needs(tmp_path: Path) -> None:
    error = refused(swap("first", lambda old: EqualLinear(old, 2.0)), tmp_path)
    assert error.bundle is not None
    assert error.bundle.parent == tmp_path
    assert str(error.bundle) in str(error)
    assert (error.bundle / "pipeline.txt").read_text() == "probe\n"
    assert "self.first" in (error.bundle / "before.py").read_text()
    assert "self.first" in (error.bundle / "after.py").read_text()
    facts = json.loads((error.bundle / "bundle.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["seed"] == 0
    assert facts["model"].endswith("test_proof.Net")
    assert facts["python"]


def test_two_bundles_do_not_meet(tmp_path: Path) -> None:
    first = refused(swap("first", lambda old: EqualLinear(old, 2.0)), tmp_path)
    second = refused(swap("first", lambda old: EqualLinear(old, 2.0)), tmp_path)
    assert first.bundle != second.bundle


def test_bundle_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VerificationError, match="broke its contract") as info:
        apply(program(), probe(swap("first", lambda old: EqualLinear(old, 2.0))), crash_folder=tmp_path / "file")
    assert info.value.bundle is None


def test_verification_can_be_left_out(tmp_path: Path) -> None:
    step = probe(swap("first", lambda old: EqualLinear(old, 2.0)))
    result = apply(program(), step, verify=False, crash_folder=tmp_path)
    assert result.history[0].verification is None
    assert list(tmp_path.iterdir()) == []


# -------------------- words kept -----------------------------------------------------------------------------


def test_equal_layer_is_the_same(tmp_path: Path) -> None:
    result = apply(program(), probe(swap("first", EqualLinear)), crash_folder=tmp_path)
    proof = result.history[0].verification
    assert proof is not None
    assert proof.passed
    assert [c.name for c in proof.checks] == [
        "graph",
        "values",
        "outputs",
        "signature",
        "tied weights",
        "kept",
        "frame",
        "deterministic",
        "same",
        "same with other weights",
    ]
    assert all(error is not None and error < 1e-10 for error in map(proof.error, ("same", "same with other weights")))


def test_layer_that_draws_nothing_leaves_the_masks_of_others(tmp_path: Path) -> None:
    """An identity for a dropout of rate 0 that stands before another one: each draws from a generator of its own."""
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.0), nn.Dropout(0.5))
    step = probe(swap("1", lambda old: nn.Identity()))
    assert apply(model, step, (torch.randn(4, DIM),), crash_folder=tmp_path).history[0].changed


def test_new_layer_with_its_formula(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        swap("first", lambda old: EqualLinear(old, 3.0))(program, context)

    step = probe(action, OTHER, lambda old, new, x: 3 * (x @ new.weight.t()) + new.bias)
    proof = apply(program(), step, crash_folder=tmp_path).history[0].verification
    assert proof is not None
    names = [c.name for c in proof.checks]
    promised = ["formula", "formula with other weights"]
    assert names[6:] == ["frame", "deterministic", *promised, "output error", "site error"]
    assert (proof.error("site error") or 0) > 0.1


def test_close_promise_is_checked_as_new_is(tmp_path: Path) -> None:
    promise = Contract(forward=CLOSE, backward=NEW)
    step = probe(swap("first", EqualLinear), promise, lambda old, new, x: x @ new.weight.t() + new.bias)
    assert apply(program(), step, crash_folder=tmp_path).history[0].contract == "forward close, backward new"


def test_pass_that_changes_nothing_says_so(tmp_path: Path) -> None:
    (record,) = apply(program(), probe(lambda program, context: None), crash_folder=tmp_path).history
    assert not record.changed
    assert record.verification is not None
    assert record.verification.passed


def test_change_that_undoes_itself_is_none(tmp_path: Path) -> None:
    def action(program: Program, context: Context) -> None:
        old = program.module.first
        context.edit.replace_layer("first", EqualLinear(old))
        context.edit.replace_layer("first", old)
        for node in program.graph.nodes:
            node.meta.pop("provenance", None)

    assert not apply(program(), probe(action), crash_folder=tmp_path).history[0].changed


def test_meta_tensors_are_not_checked_and_that_is_said(tmp_path: Path) -> None:
    with torch.device("meta"):
        before = capture(Net(), (torch.randn(4, DIM),))
    proof = apply(before, probe(swap("first", EqualLinear)), crash_folder=tmp_path).history[0].verification
    assert proof is not None
    assert proof.passed
    assert proof.checks[-1].detail == "not checked: the tensors are on the meta device"


# -------------------- what the proof runs on -----------------------------------------------------------------


def test_fresh_inputs_keep_each_domain() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 9, 9, 5]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    floats, flags = 3 + 2 * torch.randn(400, 5), torch.rand(2, 4) > 0.5
    (new_ids, new_mask, new_floats), rest = fresh_inputs((ids, mask, floats), {"flags": [flags], "scale": 0.5}, 0)
    assert sorted(new_ids.flatten().tolist()) == sorted(ids.flatten().tolist())
    assert set(new_mask.flatten().tolist()) <= {0, 1}
    assert new_mask.sum(-1).tolist() == [3, 2]
    assert abs(float(new_floats.mean()) - 3) < 0.3
    assert abs(float(new_floats.std()) - 2) < 0.3
    assert new_floats.dtype is torch.float32
    assert rest["flags"][0].dtype is torch.bool
    assert rest["scale"] == 0.5
    assert not torch.equal(new_ids, ids)


def test_fresh_inputs_are_the_same_for_a_seed_and_leave_the_examples() -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    first, again, other = (fresh_inputs((x,), {}, seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, kept)


@pytest.mark.xdist_group("ZeroHead")
def test_perturbation_moves_what_is_all_zero_or_one_and_nothing_else() -> None:
    before = shared("ZeroHead")
    state = bytes_of(before.module)
    probe = perturbed(before, 0)
    moved = {n for n, p in probe.module.named_parameters() if not same_bytes(p, before.module.get_parameter(n))}
    assert moved == {"norm.weight", "norm.bias", "scale", "head.weight", "head.bias"}
    assert untouched(before.module, state)


@pytest.mark.xdist_group("ZeroHead")
def test_error_behind_a_zero_head_is_seen(tmp_path: Path) -> None:
    """The head and a layer scale are zero: without perturbation a wrong body would not show in any output."""
    step = probe(swap("body", lambda old: EqualLinear(old, 2.0)))
    with pytest.raises(VerificationError) as info:
        apply(shared("ZeroHead"), step, crash_folder=tmp_path)
    assert failed(info.value) == ["same"]


@pytest.mark.xdist_group("ZeroHead")
def test_result_has_no_trace_of_the_perturbation(tmp_path: Path) -> None:
    result = apply(shared("ZeroHead"), probe(swap("body", EqualLinear)), crash_folder=tmp_path)
    assert not result.module.head.weight.any()
    assert not result.module.scale.any()


def test_passes_are_given_as_text_objects_or_lists() -> None:
    assert [p.text for p in as_passes(["dyt", probe(lambda p, c: None)])] == ["dyt", "probe"]


class Picks(nn.Module):
    """The rows of a norm that a mask picks: how many there are, data decide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.norm(x)[mask])  # type: ignore[no-any-return]


def test_sizes_that_data_decide_may_be_named_anew() -> None:
    program = capture(Picks(), (torch.randn(2, 5, 8), torch.rand(2, 5) > 0.5))
    assert apply(program, "dyt").history[-1].verification is not None


def test_sizes_that_data_decide_are_told_apart() -> None:
    assert (
        _unnamed("('u4', 's1', 'u2', 'u4')") == _unnamed("('u0', 's1', 'u1', 'u0')") != _unnamed("('u0', 's1', 'u1', 'u1')")
    )
