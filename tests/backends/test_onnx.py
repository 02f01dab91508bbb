"""Writing ONNX files: what is in them, that they are checked, and that a failure leaves nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.backends.onnx import convert
from rewrite.backends.onnx import export as backend
from rewrite.graph.program import Program
from tests.backends.models import Outputs, mlp, tokens, transformer
from tests.captures import capture


class Each(nn.Module):
    """Calls a function of a linear layer's output."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def each(function: Callable[[Tensor], Any]) -> Program:
    torch.manual_seed(0)
    return capture(Each(function), (torch.randn(4, 8),))


def shapes(values: Any) -> dict[str, list[str | int]]:
    """Names to sizes of a file's inputs or outputs."""
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def operators(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(file).graph.node}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer as an ONNX file; a warning meanwhile would be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rewrite.export_onnx(transformer(), tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_inputs_and_outputs_are_named_and_dynamic_sizes_kept(file: Path) -> None:
    graph = onnx.load(file).graph
    assert shapes(graph.input) == {"ids": ["batch", "sequence"], "mask": ["batch", "sequence"]}
    assert shapes(graph.output) == {
        "states": ["batch", "sequence", 16],
        "pooled_0": ["batch", 16],
        "pooled_1": ["batch", "sequence"],
        "padded": ["batch", "sequence"],
    }


def test_weights_keep_their_names(file: Path) -> None:
    names = {value.name for value in onnx.load(file).graph.initializer}
    assert {"embed.weight", "norm1.weight", "mlp.0.bias"} <= names


def test_it_is_read_by_others_without_this_package(file: Path) -> None:
    program = transformer()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ids, mask = tokens(5, 11)
    found = session.run(["states"], {"ids": ids.numpy(), "mask": mask.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), rewrite.lower(program)(ids, mask)["states"])


def test_it_is_for_inference(tmp_path: Path) -> None:
    program = mlp()
    program.module.train()
    assert not operators(rewrite.export_onnx(program, tmp_path / "model.onnx")) & {"Dropout", "RandomUniformLike"}
    assert program.module.training


def test_rms_norm_is_spelled_out_where_the_opset_has_none(tmp_path: Path) -> None:
    program = capture(nn.RMSNorm(8), (torch.randn(2, 8),))
    default = rewrite.export_onnx(program, tmp_path / "default.onnx")
    newer = rewrite.export_onnx(program, tmp_path / "newer.onnx", opset=23)
    assert [onnx.load(file).opset_import[0].version for file in (default, newer)] == [20, 23]
    assert "RMSNormalization" not in operators(default)
    assert "RMSNormalization" in operators(newer)


def test_a_converted_program(tmp_path: Path) -> None:
    program = rewrite.apply(transformer(), "dyt", verify=False)
    found = operators(rewrite.export_onnx(program, tmp_path / "model.onnx"))
    assert "Tanh" in found
    assert "LayerNormalization" not in found


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    program = capture(Outputs(), (torch.randn(2, 8),))
    graph = onnx.load(rewrite.export_onnx(program, tmp_path / "model.onnx")).graph
    assert [v.name for v in graph.output] == ["y", "x_output", "nest_0", "nest_1_0", "batch"]


def test_an_example_of_one_still_gives_a_dynamic_batch(tmp_path: Path) -> None:
    program = capture(nn.Linear(8, 8), (torch.randn(1, 8),))
    graph = onnx.load(rewrite.export_onnx(program, tmp_path / "model.onnx")).graph
    assert shapes(graph.input) == {"input": ["batch", 8]}


def test_fixed_sizes_on_demand(tmp_path: Path) -> None:
    graph = onnx.load(rewrite.export_onnx(transformer(), tmp_path / "model.onnx", dynamic=False)).graph
    assert shapes(graph.input) == {"ids": [2, 6], "mask": [2, 6]}


def test_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = mlp()
    rewrite.export_onnx(program, tmp_path / "asked.onnx", external_data=True)
    monkeypatch.setattr(backend, "_MOST_IN_ONE_FILE", 100)
    rewrite.export_onnx(program, tmp_path / "large.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["asked.onnx", "asked.onnx.data", "large.onnx", "large.onnx.data"]
    for name in ("asked.onnx", "large.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        x = torch.randn(5, 8)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), rewrite.lower(program)(x))


def test_it_names_no_file_of_this_machine(file: Path) -> None:
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()
    assert str(Path(__file__).parent).encode() not in file.read_bytes()


def test_it_says_nothing_and_the_same_program_gives_the_same_bytes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = mlp()
    first, second = (rewrite.export_onnx(program, str(tmp_path / name)) for name in ("a.onnx", "b.onnx"))
    assert first.read_bytes() == second.read_bytes()
    assert first == tmp_path / "a.onnx"
    assert capfd.readouterr() == ("", "")


# -------------------- failures: one line, and nothing left --------------------


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        # ONNX Runtime 1.31 takes no mask that is the same for all queries in opset 23's Attention
        (transformer, {"opset": 23}, r"fails with the example inputs: .*q_sequence_length.*opset 20 may do"),
        (lambda: each(lambda x: torch.linalg.eigvalsh(x @ x.T)), {}, r"Each cannot be exported to .*_linalg_eigh"),
        (lambda: each(lambda x: x + torch.rand_like(x)), {}, r"output with the example inputs is off by .* random"),
        (lambda: each(lambda x: x.bfloat16() @ x.bfloat16().T), {}, r"cannot be checked, .* check_values=False"),
        (mlp, {"opset": 17}, r"opset 17 cannot be written: the exporter starts at 18; leave it out for 20"),
        (mlp, {"opst": 18}, r"unexpected keyword argument 'opst'; did you mean 'opset'\?"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    tmp_path: Path, program: Callable[[], Program], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(rewrite.RewriteError, match=message) as failure:
        rewrite.export_onnx(program(), tmp_path / "model.onnx", **options)
    assert "\n" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unchecked_file(tmp_path: Path) -> None:
    program = each(lambda x: x.bfloat16() @ x.bfloat16().T)
    assert rewrite.export_onnx(program, tmp_path / "model.onnx", check_values=False).exists()


def test_a_wrong_file_is_caught_at_another_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = mlp()
    converted = backend.export_flat

    def fixed(program: Program, flat: Any, inputs: Any, dynamic: bool) -> Any:
        return converted(program, flat, inputs, False)

    monkeypatch.setattr(backend, "export_flat", fixed)
    with pytest.raises(rewrite.RewriteError, match="Mlp in ONNX fails with another size: "):
        rewrite.export_onnx(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("before")
    with pytest.raises(rewrite.RewriteError):
        rewrite.export_onnx(each(lambda x: x + torch.rand_like(x)), file)
    assert file.read_text() == "before"
    rewrite.export_onnx(mlp(), file)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(file))


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(rewrite.RewriteError, match="is a folder"):
        rewrite.export_onnx(mlp(), tmp_path)
    with pytest.raises(rewrite.RewriteError, match=r"cannot write .*model.onnx: there is no folder .*nowhere"):
        rewrite.export_onnx(mlp(), tmp_path / "nowhere" / "model.onnx")


def test_weights_are_needed(tmp_path: Path) -> None:
    program = mlp()
    program.module.to("meta")
    with pytest.raises(rewrite.RewriteError, match="meta device"):
        rewrite.export_onnx(program, tmp_path / "model.onnx")


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(rewrite.RewriteError, match="ONNX needs onnxscript, not installed here: pip install onnxscript"):
        rewrite.export_onnx(mlp(), tmp_path / "model.onnx")
