"""The kit: a right pass passes every check, and each kind of wrong pass is refused by the check of its name."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import NEW, SAME, Contract, Pass, RewriteError, Selector, option
from rewrite.graph.program import Program
from rewrite.pipeline.context import Context
from rewrite.pipeline.registry import as_passes
from rewrite.testing import CHECKS, FreshProcess, PassCheckError, Subject, Trial, check_pass, check_refused

ATEN = torch.ops.aten


class Model(nn.Module):
    """Two exact GELUs, one that is not, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act1 = nn.Linear(8, 8), nn.GELU()
        self.second, self.act2 = nn.Linear(8, 8), nn.GELU()
        self.third, self.tanh, self.norm = nn.Linear(8, 8), nn.GELU(approximate="tanh"), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.second(self.act1(self.first(x))))
        return self.norm(self.tanh(self.third(x)))


@functools.cache
def subject() -> Subject:
    torch.manual_seed(0)
    return Subject(Model(), (torch.randn(4, 8),))


class Site(NamedTuple):
    path: str
    types: tuple[str, ...]


def gelus(program: Program, approximate: str) -> list[Site]:
    found = (
        str(n.target) for n, layer in program.layers() if isinstance(layer, nn.GELU) and layer.approximate == approximate
    )
    return [Site(path, ("GELU",)) for path in dict.fromkeys(found)]


@dataclass(frozen=True)
class Right(Pass):
    """Replace GELU with PReLU: y = max(x, 0) + slope min(x, 0)."""

    name = "right"
    slope: float = option(0.25, "slope below zero")
    where: Selector = option(Selector("*"), "activations to replace")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        for site in gelus(program, "tanh"):
            context.skip(site.path, "its GELU is the approximate one")
        for site in context.choose(gelus(program, "none"), self.where):
            context.edit.replace_layer(site.path, self.layer(program, context))

    def layer(self, program: Program, context: Context) -> nn.Module:
        like = next(program.module.parameters())
        made = nn.PReLU(1, self.slope, device=like.device, dtype=like.dtype)
        if not like.is_meta:
            nn.init.constant_(made.weight, self.slope)
        return made

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return torch.where(x > 0, x, new.weight * x)


PATHS = ("act1", "act2")
NEAR = {"tanh": "approximate"}


def trial(step: Pass, **options: Any) -> Trial:
    return Trial(step, subject(), **{"changes": PATHS, "near_miss": NEAR, **options})


def test_a_right_pass_passes_every_check(fresh_process: FreshProcess) -> None:
    found = check_pass(Right(slope=0.1), subject(), changes=PATHS, near_miss=NEAR, process=fresh_process)
    assert list(found) == list(CHECKS)
    assert not [words for words in found.values() if "not checked" in words or "refused" in words]
    assert found["text"] == "right{slope=0.1}"
    assert found["twice"] == "the second run changes nothing"
    assert found["grafted"] == "a Model again"
    assert found["partial"] == "where=act1 leaves 1 others"


# -------------------- wrong passes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dumb(Right):
    """An option says nothing about itself."""

    quiet: int = 3


@dataclass(frozen=True)
class Undocumented(Right):
    pass


@dataclass(frozen=True)
class Growing(Right):
    """Its option is another one each time it is written and read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "slope", self.slope * 2)


@dataclass(frozen=True)
class Random(Right):
    """Draws from the global generator."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return nn.PReLU(1, float(torch.rand(())))


@dataclass(frozen=True)
class Counting(Right):
    """Keeps a state between runs."""

    runs: ClassVar[list[int]] = []

    def layer(self, program: Program, context: Context) -> nn.Module:
        self.runs.append(1)
        return nn.PReLU(1, 0.1 * len(self.runs))


@dataclass(frozen=True)
class WritesTensors(Right):
    """Scales a weight in place, which may be the user's."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        with torch.no_grad():
            program.module.first.weight.mul_(2)


@dataclass(frozen=True)
class WritesInputs(Right):
    """Writes into the example inputs."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        program.example_args[0].add_(1)


@dataclass(frozen=True)
class WritesData(Right):
    """Writes into the data."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        next(iter(context.data)).args[0].zero_()


@dataclass(frozen=True)
class Unjournaled(Right):
    """Changes a layer past the edit layer, and nothing else."""

    def run(self, program: Program, context: Context) -> None:
        program.module.norm.eps = 0.5


@dataclass(frozen=True)
class Pretends(Right):
    """Says that it replaced layers, by layers that are the same."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return nn.GELU()


@dataclass(frozen=True)
class Greedy(Right):
    """Changes the norm as well."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        if [1 for _, layer in program.layers() if isinstance(layer, nn.LayerNorm)]:
            context.edit.replace_layer("norm", nn.Identity())


@dataclass(frozen=True)
class Silent(Right):
    """Leaves the near miss alone and says nothing."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        context.skipped[:] = [skip for skip in context.skipped if skip.path != "tanh"]


@dataclass(frozen=True)
class Reasonless(Right):
    """Leaves the near miss alone for no reason."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        context.skip("third", " ")


@dataclass(frozen=True)
class Insists(Right):
    """A model without a place for it is an error."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        if not context.edit.changes:
            raise RewriteError("there is no GELU")


@dataclass(frozen=True)
class Meddles(Right):
    """Adds a copy of the first input to any model."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        first = next(iter(program.graph.nodes))
        context.edit.rewire(first, context.edit.insert_function(ATEN.clone.default, (first,), after=first))


@dataclass(frozen=True)
class IgnoresWhere(Right):
    """Never looks at its option where."""

    def run(self, program: Program, context: Context) -> None:
        for site in gelus(program, "none"):
            context.edit.replace_layer(site.path, self.layer(program, context))


@dataclass(frozen=True)
class Overreaches(Right):
    """Asks its selector, and changes every place all the same."""

    def run(self, program: Program, context: Context) -> None:
        context.choose(gelus(program, "none"), self.where)
        IgnoresWhere.run(self, program, context)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WrongFormula(Right):
    """The layer is not the formula."""

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: Tensor) -> Tensor:
        return 1.001 * super().reference(old, new, *inputs)


@dataclass(frozen=True)
class BreaksItsWord(Right):
    """Promises the same function and gives another."""

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)


@dataclass(frozen=True)
class Again(Right):
    """Finds something to change in each run."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        for path in PATHS:
            layer = getattr(program.module, path, None)
            if isinstance(layer, nn.PReLU):
                context.edit.replace_layer(path, nn.PReLU(1, float(layer.weight.detach()) / 2))


class CopiesItself(nn.PReLU):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        return self


@dataclass(frozen=True)
class OneForAll(Right):
    """Puts in a layer that a deep copy shares."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return CopiesItself(1, self.slope)


@dataclass(frozen=True)
class Borrows(Right):
    """Puts in a tensor that belongs to the program before."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        made = nn.PReLU(1)
        made.weight = subject().program.module.first.bias
        return made


class Closure(nn.PReLU):
    def __init__(self, slope: float) -> None:
        super().__init__(1, slope)
        self.function: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, input: Tensor) -> Tensor:
        return self.function(super().forward(input))


@dataclass(frozen=True)
class Unsavable(Right):
    """Puts in a layer with a function in it, which no file holds."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Closure(self.slope)


@dataclass(frozen=True)
class OnlyHere(Right):
    """Puts in a layer whose class no other process knows."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        home = sys.modules.setdefault("made_up_while_running", ModuleType("made_up_while_running"))
        home.Local = type("Local", (nn.PReLU,), {"__module__": home.__name__})  # type: ignore[attr-defined]
        made: nn.Module = home.Local(1, self.slope)  # type: ignore[attr-defined]
        return made


class Detached(nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.prelu(input, self.weight.detach())


@dataclass(frozen=True)
class Untrainable(Right):
    """Puts in a parameter that no gradient reaches."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Detached(1, self.slope)


class Root(nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + (input - input).sqrt()


@dataclass(frozen=True)
class Explodes(Right):
    """Puts in a layer with an infinite slope."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Root(1, self.slope)


class Wide(nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.ones(8)


@dataclass(frozen=True)
class Promotes(Right):
    """Puts in a layer that computes in float32 whatever comes."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Wide(1, self.slope)


class Casts(nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.prelu(input, self.weight.to(input.dtype))


@dataclass(frozen=True)
class Default32(Right):
    """Makes its parameters in float32 in a model of another dtype."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Casts(1, self.slope, device=next(program.module.parameters()).device)


@dataclass(frozen=True)
class ReadsValues(Right):
    """Cannot do without values, and does not say so."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return nn.PReLU(1, float(program.module.first.weight.abs().max()))


@dataclass(frozen=True)
class MakesValues(Right):
    """Puts values into a model that has none."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        made = super().layer(program, context)
        made.register_buffer("table", torch.ones(3))
        return made


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@dataclass(frozen=True)
class Hides(Right):
    """Puts in a layer of its own that it does not announce, so that the next capture sees what is inside."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Holder(nn.GELU())


class Bessel(nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.special.bessel_j1(input.detach())


@dataclass(frozen=True)
class Unlowerable(Right):
    """Puts in an operator that ONNX does not have."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Bessel(1, self.slope)


class Doubled(nn.GELU):
    """Twice a GELU, that claims to be one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def plain(self) -> nn.Module:
        return nn.GELU()


@dataclass(frozen=True)
class Claims(Right):
    """Puts in a layer that computes something else than it says for inference."""

    def layer(self, program: Program, context: Context) -> nn.Module:
        return Doubled()


@dataclass(frozen=True)
class Crashes(Right):
    """Fails with an error of its own."""

    def run(self, program: Program, context: Context) -> None:
        raise KeyError("norm")


WRONG: list[tuple[str, Pass, str]] = [
    ("described", Dumb(), "option quiet has no line of help"),
    ("described", Undocumented(), "no docstring"),
    ("text", Growing(slope=0.1), "is read as"),
    ("deterministic", Random(), "two runs differ"),
    ("deterministic", Counting(), "two runs differ"),
    ("untouched", WritesTensors(), "writes into a tensor of shape (8, 8) that is not its own"),
    ("untouched", WritesInputs(), "an example input"),
    ("untouched", WritesData(), "the data"),
    ("changes", Unjournaled(), "act1, act2 should change and did not"),
    ("changes", Pretends(), "act1, act2 should change and did not"),
    ("changes", Greedy(), "norm changed and should not"),
    ("runs", Crashes(), "KeyError"),
    ("near miss", Silent(), "tanh is left alone without a reason"),
    ("near miss", Reasonless(), "third is left alone without a reason"),
    ("elsewhere", Insists(), "is no error: there is no GELU"),
    ("elsewhere", Meddles(), "was changed"),
    ("partial", IgnoresWhere(), "where is never asked"),
    ("partial", Overreaches(), "changed act2, which it does not select"),
    ("proof", WrongFormula(), "formula"),
    ("proof", BreaksItsWord(), "same"),
    ("twice", Again(), "in the second run"),
    ("copied", OneForAll(), "shared with a deep copy"),
    ("copied", Borrows(), "shared with the program before"),
    ("saved", Unsavable(), "after it not"),
    ("fresh", OnlyHere(), "fresh process"),
    ("trained", Untrainable(), "no gradient reaches the new parameter act1.weight"),
    ("trained", Explodes(), "is not finite"),
    ("bfloat16", Promotes(), "cast to bfloat16 it does not run"),
    ("bfloat16", Default32(), "act1.weight is torch.float32"),
    ("meta", ReadsValues(), "raised"),
    ("meta", MakesValues(), "act1.table is no meta tensor"),
    ("captured again", Hides(), "act1 is a Holder and is seen as no layer; announce it: Hides.inserts = (Holder,)"),
    ("lowered", Unlowerable(), "refuses it after"),
    ("lowered", Claims(), "off"),
]


@pytest.mark.parametrize(("check", "step", "words"), WRONG, ids=[type(step).__name__ for _, step, _ in WRONG])
@pytest.mark.xdist_group("wrong passes")
def test_a_wrong_pass_is_refused_by_the_check_of_its_name(
    check: str, step: Pass, words: str, fresh_process: FreshProcess
) -> None:
    given = trial(step, data=torch.ones(3), process=fresh_process)
    with pytest.raises(PassCheckError) as info:
        CHECKS.get(check, CHECKS["changes"])(given)
    assert info.value.check == check
    assert words in str(info.value)
    assert len(str(info.value).splitlines()[0]) > len(check) + 2


def test_what_leaves_inference_as_it_was_is_not_converted_again() -> None:
    assert "given what it was given before" in CHECKS["lowered"](trial(as_passes("compress-activations{min_size=1}")[0]))


def test_every_check_refuses_something() -> None:
    can_always_be_put_back = {"grafted"}
    assert {*CHECKS} - {check for check, _, _ in WRONG} == can_always_be_put_back


# -------------------- the rest of the interface ------------------------------------------------------------------


def test_an_unjournaled_change_is_refused_where_nothing_should_change() -> None:
    with pytest.raises(PassCheckError, match=r"changes: the program differs .* and the pass names no change"):
        CHECKS["changes"](trial(Unjournaled(), changes=0))


def test_what_changes_may_be_a_number() -> None:
    assert CHECKS["changes"](trial(Right(), changes=2)) == "2 places"
    with pytest.raises(PassCheckError, match=r"^changes: 3 places should change, 2 did: act1, act2$"):
        CHECKS["changes"](trial(Right(), changes=3))


def test_a_pass_that_changes_again_says_so() -> None:
    assert CHECKS["twice"](trial(Again(), again=PATHS)) == "the second run changes 2"
    with pytest.raises(PassCheckError, match="twice: in the second run act1, act2 should change and did not"):
        CHECKS["twice"](trial(Right(), again=PATHS))


def test_a_second_run_may_be_refused() -> None:
    given = trial(Right(where=Selector("act1")), changes={"act1"})
    assert CHECKS["twice"](given).startswith("the second run is refused: where=act1 matches none of the 1 places")


@dataclass(frozen=True)
class Inserts(Right):
    """Insert a doubling after each GELU, halved again: y = (x + x) / 2."""

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        nodes = {str(n.target): n for n, layer in program.layers() if isinstance(layer, nn.GELU)}
        for site in context.choose(gelus(program, "none"), self.where):
            node = nodes[site.path]
            twice = context.edit.insert_function(ATEN.add.Tensor, (node, node), after=node)
            half = context.edit.insert_function(ATEN.div.Tensor, (twice, 2), after=twice)
            context.edit.rewire(node, half, users=lambda user, twice=twice: user is not twice)


def test_what_cannot_be_put_into_the_class_is_refused_by_name() -> None:
    given = trial(Inserts(), changes=6, near_miss={})
    assert CHECKS["grafted"](given).startswith("refused: pass right changed the graph between layers")
    assert CHECKS["captured again"](given) == "not checked: it is not grafted"
    assert CHECKS["proof"](given).startswith("forward same")


def test_a_program_and_a_model_are_subjects_too() -> None:
    program = subject().program
    assert Subject(program).program is program
    assert CHECKS["grafted"](Trial(Right(), Subject(program), PATHS)).startswith("not checked")
    assert Subject(Model(), (torch.randn(4, 8),)).bare is not None


def test_pipeline_text_is_one_pass() -> None:
    with pytest.raises(RewriteError, match="one pass at a time, not 2"):
        check_pass("dyt,dyt", subject(), changes=1)
    with pytest.raises(PassCheckError, match="changes: 2 places should change, 1 did: norm"):
        check_pass("dyt{alpha=0.3}", subject(), changes=2)


@dataclass(frozen=True)
class Refuses(Right):
    """Refuse what has a norm."""

    def run(self, program: Program, context: Context) -> None:
        raise RewriteError("norm is in the way: remove it first")


def test_a_refusal_says_why() -> None:
    assert check_refused(Refuses(), subject(), reason="norm is in the way").startswith("norm")
    with pytest.raises(PassCheckError, match=r"refused: .* does not say 'tied'"):
        check_refused(Refuses(), subject(), reason="tied")
    with pytest.raises(PassCheckError, match="refused: it runs, and should be refused"):
        check_refused(Right(), subject(), reason="norm")
    with pytest.raises(PassCheckError, match="refused: right raised KeyError"):
        check_refused(Crashes(), subject(), reason="norm")


def test_a_fresh_process_serves_many_files_and_says_what_went_wrong(tmp_path: Path) -> None:
    file = rewrite.save(subject().program, tmp_path / "a.pt2")
    with FreshProcess() as process:
        first, second = (process.observed(file) for _ in range(2))
        with pytest.raises(RuntimeError, match="there is no file"):
            process.observed(tmp_path / "missing.pt2")
        assert process.observed(file).keys() == {False, True}
    assert torch.equal(first[True].outputs[0], second[True].outputs[0])
    assert copy.copy(process).process is None
