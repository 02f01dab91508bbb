"""An ONNX file opened in ONNX Runtime, with torch tensors in and out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_FATAL, _WARNING = 4, 2  # severities from which ONNX Runtime prints log lines
_TYPES: dict[str, tuple[torch.dtype, int]] = {  # ONNX Runtime's name to PyTorch's type and ONNX's number
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int8)": (torch.int8, 3),
    "tensor(int16)": (torch.int16, 5),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}


class Session:
    """An ONNX file opened by ONNX Runtime: a list of tensors in, a list of tensors out, on the first input's device.

    ``device`` is where it computes. Inputs that are there are not copied, others are. ``providers`` are the execution
    providers in use, which may be fewer than were asked for: one that cannot be started is left out silently.
    TF32 is used where PyTorch's matrix products may use it.
    """

    def __init__(self, file: Path, providers: Sequence[str]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL  # what matters is raised
        options.intra_op_num_threads = torch.get_num_threads()
        settings = {CUDA: {"use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32))}}
        with _silenced():
            self.session = onnxruntime.InferenceSession(
                file, options, providers=[(name, settings.get(name, {})) for name in providers]
            )
        self.session.disable_fallback()
        self.providers: list[str] = self.session.get_providers()
        on_cuda = CUDA in self.providers
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        self.inputs = [(each.name, *_TYPES[each.type]) for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        home = inputs[0].device if inputs else self.device
        place = (self.device.type, self.device.index or 0)
        bound = self.session.io_binding()
        kept = [
            self._placed(name, dtype, value)  # a binding only holds addresses
            for (name, dtype, _), value in zip(self.inputs, inputs, strict=True)
        ]
        for (name, dtype, number), value in zip(self.inputs, kept, strict=True):
            # an empty tensor has no address, and is not read at any
            address = value.data_ptr() or torch.empty(1, dtype=dtype, device=self.device).data_ptr()
            bound.bind_input(name, *place, number, list(value.shape), address)
        for name in self.outputs:
            bound.bind_output(name, *place)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime computes on a stream of its own
        self.session.run_with_iobinding(bound)
        bound.synchronize_outputs()
        return [_tensor(value).to(home) for value in bound.get_outputs()]

    def _placed(self, name: str, dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
        if value.dtype != dtype:
            raise TypeError(
                f"input {name!r} is {value.dtype}, the program takes {dtype}: convert it, or capture the "
                "model with such an input"
            )
        return value.detach().to(self.device).contiguous()


def _tensor(value: Any) -> torch.Tensor:
    """ONNX Runtime's output as a tensor: the same memory where this version can share it."""
    if hasattr(value, "__dlpack__"):
        return from_dlpack(value).to(_TYPES[value.data_type()][0])
    if value.data_type() == "tensor(bfloat16)":
        raise TypeError("bfloat16 outputs need a newer ONNX Runtime: pip install --upgrade onnxruntime")
    return torch.from_numpy(value.numpy())


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep ONNX Runtime from printing why a provider does not start; there is no other way to ask for that."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
