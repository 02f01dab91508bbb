"""Programs in files: what comes back, and what is refused with the file that was there left alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import rewrite
from rewrite import RewriteError
from rewrite.frontend.trace import bind_inputs
from tests.models.stress import stress_cases
from tests.models.zoo import transformers_case

CASES = {c.name: c for c in stress_cases()}


def changed(name: str) -> rewrite.Program:
    case = CASES[name]
    args, kwargs = case.inputs(2, 12)
    return rewrite.apply(rewrite.capture(case.build(), args, kwargs), "dyt", verify=False)


@pytest.mark.parametrize(
    "name",
    [
        "TrainingBranchInChild",
        "TiedHead",
        "BatchNormTwice",
        "RMSNormSpellings",
        "ConstantAttribute",
        "NonPersistentBuffer",
        "NoGradient",
        "SharedUnderTwoNames",
        "SpectralNormParametrized",
    ],
)
def test_the_same_program_comes_back(name: str, tmp_path: Path) -> None:
    program = changed(name)
    again = rewrite.load(rewrite.save(program, tmp_path / "x.pt2"))
    assert [(n.name, n.op, str(n.target)) for n in again.graph.nodes] == [
        (n.name, n.op, str(n.target)) for n in program.graph.nodes
    ]
    assert list(again.module.state_dict()) == list(program.module.state_dict())
    assert again.history == program.history
    compared = rewrite.verify(program, again)
    assert compared.same
    assert compared.bitwise


def test_torch_export_reads_the_evaluation_mode(tmp_path: Path) -> None:
    program = changed("EncoderLayer")
    rewrite.save(program, tmp_path / "x.pt2")
    plain = torch.export.load(tmp_path / "x.pt2").module()
    expected = program.module.eval()(*program.example_args)
    assert torch.allclose(plain(*program.example_args), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["NonPersistentBuffer", "TiedHead"])
def test_a_program_without_weights_is_a_file_of_its_graph(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    args, kwargs = case.inputs(2, 12)
    with torch.device("meta"):
        model = case.build()
    args = tuple(value.to("meta") if isinstance(value, torch.Tensor) else value for value in args)
    program = rewrite.capture(model, args, kwargs)
    again = rewrite.load(rewrite.save(program, tmp_path / "x.pt2"))
    assert {k: (v.shape, v.dtype, v.device.type) for k, v in again.module.state_dict().items()} == {
        k: (v.shape, v.dtype, "meta") for k, v in program.module.state_dict().items()
    }
    assert again.module(*args, **kwargs).shape == program.module(*args, **kwargs).shape
    assert torch.export.load(tmp_path / "x.pt2").graph_signature.user_inputs


def test_a_file_is_as_large_as_its_tensors(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
    path = rewrite.save(rewrite.capture(model, (torch.randn(2, 1024),)), tmp_path / "x.pt2")
    assert path.stat().st_size <= 1.005 * sum(p.nbytes for p in model.parameters())


def test_strides_stay_as_they_are(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    again = rewrite.load(rewrite.save(rewrite.capture(model, (torch.randn(2, 3, 8, 8),)), tmp_path / "x.pt2"))
    loaded = dict(again.module.named_parameters())
    assert [loaded[n].stride() for n in loaded] == [p.stride() for p in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_export_of_a_real_model_is_read(name: str, tmp_path: Path) -> None:
    case = transformers_case(name)
    inputs = bind_inputs(case.build(), *case.inputs(2, 12))
    model = case.build().eval()
    torch.export.save(torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False), tmp_path / "x.pt2")
    program = rewrite.load(tmp_path / "x.pt2")
    found, wanted = program.module.eval()(*inputs.args, **inputs.kwargs), model(*inputs.args, **inputs.kwargs)
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x89PNG\r\n", pickle.dumps({"a": 1})])
def test_a_foreign_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(RewriteError) as error:
        rewrite.load(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_truncated_file_and_a_missing_one(tmp_path: Path) -> None:
    path = rewrite.save(changed("TiedHead"), tmp_path / "x.pt2")
    path.write_bytes(path.read_bytes()[:-200])
    for bad in (path, tmp_path / "none.pt2"):
        with pytest.raises(RewriteError):
            rewrite.load(bad)


def test_own_code_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"before")
    with pytest.raises(RewriteError, match="code of your own"):
        rewrite.save(changed("StraightThrough"), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
