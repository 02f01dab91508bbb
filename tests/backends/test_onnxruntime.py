"""The ONNX Runtime lowering: the model's calling convention over ONNX Runtime."""

from __future__ import annotations

import inspect
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.backends import onnxruntime as backend
from rewrite.backends.onnx import session
from tests.backends.models import Mlp, Outputs, Transformer, error, mlp, tokens, transformer
from tests.captures import capture

# measured: 1e-7 to 3e-7 on these, relative to the largest value of an output
TOLERANCE = 1e-5


class Types(nn.Module):
    """Inputs of several dtypes, one of them unused, and outputs of several."""

    def forward(self, x: Tensor, small: Tensor, flag: Tensor, unused: Tensor) -> tuple[Any, ...]:
        return x * small[:, None].to(x.dtype), small + 1, ~flag, x.mean(), x.double()


def types(dtype: torch.dtype, batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 4).to(dtype), torch.arange(batch, dtype=torch.int32), torch.ones(batch) > 0, torch.ones(3)


def test_it_computes_what_eager_does_in_the_model_s_own_structure() -> None:
    program = transformer()
    run, eager = rewrite.lower(program, "onnxruntime"), rewrite.lower(program)
    assert list(inspect.signature(run).parameters) == ["ids", "mask", "scale"]
    for batch, length in ((2, 6), (3, 9), (1, 4)):
        ids, mask = tokens(batch, length)
        assert error(eager(ids, mask), run(ids, mask)) < TOLERANCE
        assert error(eager(ids, mask), run(mask=mask, ids=ids, scale=1.0)) < TOLERANCE
    assert program.module.training


def test_outputs_of_every_kind() -> None:
    program = capture(Outputs(), (torch.randn(2, 8),))
    run, eager = rewrite.lower(program, "onnxruntime"), rewrite.lower(program)
    x = torch.randn(3, 8)
    found = run(x)
    assert error(eager(x), found) < TOLERANCE
    assert (found["none"], found["three"], found["batch"]) == (None, 3, 3)
    assert torch.equal(found["x"], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    program = capture(Types(), types(dtype, 2))
    run, eager = rewrite.lower(program, "onnxruntime"), rewrite.lower(program)
    inputs = types(dtype, 5)
    assert error(eager(*inputs), run(*inputs)) < (1e-2 if dtype is torch.float16 else TOLERANCE)


def test_bfloat16_in_and_out() -> None:
    program = capture(nn.Identity(), (torch.randn(2, 4).bfloat16(),))
    x = torch.randn(3, 4).bfloat16()
    assert torch.equal(rewrite.lower(program, "onnxruntime")(x), x)


def test_inputs_are_read_through_their_strides_and_may_be_empty() -> None:
    program = mlp()
    run, eager = rewrite.lower(program, "onnxruntime"), rewrite.lower(program)
    x = torch.randn(8, 6).T
    assert error(eager(x), run(x)) < TOLERANCE
    assert run(x[:0]).shape == (0, 4)


def test_results_outlive_the_next_call_and_the_lowering() -> None:
    run = rewrite.lower(mlp(), "onnxruntime")
    x = torch.randn(4, 8)
    first = run(x)
    copied = first.clone()
    for _ in range(10):
        run(torch.randn(4, 8))
    del run
    assert torch.equal(first, copied)


def test_a_wrong_input_is_named() -> None:
    run = rewrite.lower(mlp(), "onnxruntime")
    with pytest.raises(TypeError, match=r"input 'x' is torch.float64, the program takes torch.float32"):
        run(torch.randn(4, 8).double())
    with pytest.raises(ValueError, match="capture fixed"):
        run(torch.randn(4, 9))
    with pytest.raises(rewrite.RewriteError, match="do not fit the model's signature"):
        run()
    with pytest.raises(ValueError, match="the capture only holds while"):
        rewrite.lower(transformer(), "onnxruntime")(*tokens(2, 17))


def test_providers() -> None:
    program = mlp()
    for name in ("cpu", "CPUExecutionProvider"):
        assert rewrite.lower(program, "onnxruntime", providers=[name]).providers == ["CPUExecutionProvider"]
    with pytest.raises(rewrite.RewriteError, match=r"this ONNX Runtime has no tpu; it has .*CPUExecutionProvider"):
        rewrite.lower(program, "onnxruntime", providers=["tpu"])


def test_cuda_that_pytorch_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    program = mlp()
    monkeypatch.setattr(backend, "_has_cuda", lambda: False)
    assert rewrite.lower(program, "onnxruntime").providers == ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [session.CUDA, session.CPU])
    with pytest.raises(rewrite.RewriteError, match="PyTorch sees no CUDA device"):
        rewrite.lower(program, "onnxruntime", providers=["cuda"])


def test_cuda_that_does_not_start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    program = mlp()
    opened = session.Session.__init__

    def without_cuda(self: session.Session, file: Any, providers: Any) -> None:
        opened(self, file, [session.CPU])

    monkeypatch.setattr(backend, "_has_cuda", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [session.CUDA, session.CPU])
    monkeypatch.setattr(session.Session, "__init__", without_cuda)
    with pytest.raises(rewrite.RewriteError, match="cannot start CUDAExecutionProvider: are the libraries"):
        rewrite.lower(program, "onnxruntime", providers=["cuda"])
    with pytest.warns(UserWarning, match="It runs on the CPU"):
        run = rewrite.lower(program, "onnxruntime")
    assert run.providers == ["CPUExecutionProvider"]
    assert capfd.readouterr() == ("", "")


def test_what_onnx_cannot_express_is_one_line() -> None:
    class Eigenvalues(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.T)

    program = capture(Eigenvalues(), (torch.randn(4, 8),))
    with pytest.raises(rewrite.RewriteError, match="Eigenvalues cannot be exported to ONNX") as failure:
        rewrite.lower(program, "onnxruntime")
    assert "\n" not in str(failure.value)


@pytest.mark.gpu
@pytest.mark.parametrize("pass_", ["", "dyt"])
def test_on_cuda(pass_: str) -> None:
    torch.manual_seed(0)
    program = capture(Transformer().cuda(), [t.cuda() for t in tokens(2, 6)])
    program = rewrite.apply(program, pass_, verify=False) if pass_ else program
    run, eager = rewrite.lower(program, "onnxruntime", providers=["cuda", "cpu"]), rewrite.lower(program)
    assert run.providers[0] == session.CUDA
    for batch, length in ((2, 6), (3, 9), (1, 4)):
        inputs = [t.cuda() for t in tokens(batch, length)]
        assert error(eager(*inputs), run(*inputs)) < 1e-4


@pytest.mark.gpu
def test_cuda_is_the_default_and_results_come_back_to_where_inputs_are() -> None:
    torch.manual_seed(0)
    program = capture(Mlp(), (torch.randn(4, 8),))
    run, eager = rewrite.lower(program, "onnxruntime"), rewrite.lower(program)
    assert run.providers[0] == session.CUDA
    x = torch.randn(5, 8)
    assert error(eager(x), run(x)) < 1e-4
    assert run(x.cuda()).device.type == "cuda"


@pytest.mark.gpu
def test_float16_on_cuda() -> None:
    torch.manual_seed(0)
    program = capture(Mlp().half().cuda(), (torch.randn(4, 8, dtype=torch.float16, device="cuda"),))
    x = torch.randn(5, 8, dtype=torch.float16, device="cuda")
    assert error(rewrite.lower(program)(x), rewrite.lower(program, "onnxruntime")(x)) < 1e-2
