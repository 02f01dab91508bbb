"""Values at chosen nodes on data: those that the model has, in one pass, with nothing of the caller's changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rewrite import Program, RewriteError
from rewrite.analysis.norms import norms
from rewrite.analysis.observe import observe
from tests.captures import capture, shared


class Keep:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, ...]] = []

    def update(self, *values: Tensor) -> None:
        self.seen.append(values)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.relu_(self.drop(self.norm(self.first(x))))
        x = x if scale is None else x * scale
        return self.last(x)


def program_of(**kwargs: Any) -> Program:
    torch.manual_seed(0)
    model = Model()
    model.train()(torch.randn(64, 4))
    return capture(model, (torch.randn(2, 4),), kwargs)


def node(program: Program, path: str) -> torch.fx.Node:
    return next(n for n, _ in program.layers() if str(n.target) == path)


DATA = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))

FORMS: dict[str, Any] = {
    "a tensor of all samples": DATA,
    "tensors": list(DATA.split(32)),
    "tuples": [(piece,) for piece in DATA.split(32)],
    "dicts": [{"x": piece, "labels": 0} for piece in DATA.split(32)],
    "pairs": [((piece,), {}) for piece in DATA.split(32)],
    "a generator": (piece for piece in DATA.split(32)),
    "a data loader": DataLoader(TensorDataset(DATA, torch.arange(100)), batch_size=32),
    "arrays in double": list(DATA.double().numpy().reshape(10, 10, 4)),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_models_in_evaluation(form: str) -> None:
    program = program_of()
    seen, norm = Keep(), node(program, "norm")
    observe(program, {norm: seen}, FORMS[form])
    model = program.clone().module.eval()
    with torch.no_grad():
        expected = model.norm(model.first(DATA))
    torch.testing.assert_close(torch.cat([value for (value,) in seen.seen]), expected)


def test_values_of_one_call_belong_together_and_are_as_they_were_computed() -> None:
    program = program_of()
    first, drop, last = (node(program, path) for path in ("first", "drop", "last"))
    found = Keep()
    observe(program, {(first, drop, last): found}, [DATA])
    ((x, dropped, y),) = found.seen
    model = program.clone().module.eval()
    with torch.no_grad():
        torch.testing.assert_close(x, model.first(DATA))
        torch.testing.assert_close(dropped, model.norm(x), msg="before the relu that writes into it")
        torch.testing.assert_close(y, model.last(dropped.relu()))


def test_moments_by_default_with_progress() -> None:
    program, told = program_of(), []
    norm = node(program, "norm")
    found = observe(program, [norm], list(DATA.split(25)), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found[norm].count == 800


def test_nothing_of_the_callers_is_changed() -> None:
    program, data = program_of(), [DATA.clone()]
    before, state = copy.deepcopy(program.module.state_dict()), torch.get_rng_state()
    program.module.train()
    observe(program, [node(program, "last")], data)
    assert program.module.training
    assert all(torch.equal(before[k], v) for k, v in program.module.state_dict().items())
    assert torch.equal(data[0], DATA)
    assert torch.equal(state, torch.get_rng_state())


def test_it_runs_no_further_than_it_is_asked() -> None:
    program = shared("gpt2")
    first = norms(program)[0].node
    ran: list[str] = []
    kept = torch.fx.Interpreter.run_node

    def run_node(self: Any, n: torch.fx.Node) -> Any:
        ran.append(n.name)
        return kept(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fx.Interpreter, "run_node", run_node)
        observe(program, [first], [{"input_ids": torch.randint(0, 50, (2, 6))}])
    assert ran[-1] == first.name


def test_a_batch_that_the_capture_fixed_is_cut_to_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(6, 4)

    program, found = capture(Fixed(), (torch.randn(8, 4),)), Keep()
    observe(program, {node(program, "layer"): found}, DATA)
    assert [len(value) for (value,) in found.seen] == [8] * 12, "the last four of 100 are no batch"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        ([DATA, torch.randn(3, 5)], r"does not run on item 1 of the data: .*\(3, 5\)"),
        ([(DATA, DATA)], "does not run on item 0 of the data: .*scale.* was not given at capture"),
        ([{"y": DATA, "x": torch.ones(2, 4, dtype=torch.int64)}], "does not run on item 0 of the data"),
        (3, "not a int"),
    ],
    ids=["empty", "shape", "too many", "dtype", "no data"],
)
def test_data_that_does_not_fit(data: Any, message: str) -> None:
    program = program_of()
    with pytest.raises(RewriteError, match=message):
        observe(program, [node(program, "first")], data)


def test_on_the_meta_device_there_is_nothing() -> None:
    program = capture(Model().to("meta"), (torch.randn(2, 4, device="meta"),))
    with pytest.raises(RewriteError, match="meta device"):
        observe(program, [node(program, "first")], [DATA])
