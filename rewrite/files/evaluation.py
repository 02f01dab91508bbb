"""The part of a `.pt2` that torch.export reads: the program in evaluation mode, exported, with its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from rewrite.errors import RewriteError
from rewrite.graph.codegen import keyword_safe
from rewrite.graph.export import Inputs, export_program, widened
from rewrite.graph.regions import Region
from rewrite.lowering.composed import composed
from rewrite.lowering.inference import evaluated
from rewrite.lowering.layer_traces import NotComposedError
from rewrite.torch_private import schema, serialize, serialized

from .specs import plain_spec
from .tensors import TensorWriter, dense_strides

if TYPE_CHECKING:
    from rewrite.graph.program import Program

    from .archive import Writer

EXAMPLES = "data/sample_inputs/model.pt"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"


def write_evaluation(program: Program, writer: Writer, tensors: TensorWriter, examples: bytes) -> None:
    """Write what torch.export.load reads, under the name ``model``, its tensors by ``tensors``."""
    exported = exported_evaluation(program)
    state, held = dict(exported.state_dict), {name: _tensor(name, value) for name, value in exported.constants.items()}
    exported._state_dict = {name: _hollow(tensor) for name, tensor in state.items()}  # the graph alone is serialized
    exported._constants = {name: _hollow(tensor) for name, tensor in held.items()}
    exported._example_inputs = None
    with keyword_safe():
        content = serialized(exported)
    weights = {name: (tensor, tensors.add(tensor, f"{_WEIGHTS}weight_")) for name, tensor in state.items()}
    constants = {name: (tensor, tensors.add(tensor, f"{_CONSTANTS}tensor_")) for name, tensor in held.items()}
    writer.add(f"{_WEIGHTS}model_weights_config.json", _config(weights, _WEIGHTS))
    writer.add(f"{_CONSTANTS}model_constants_config.json", _config(constants, _CONSTANTS))
    writer.add("models/model.json", content)
    writer.add(EXAMPLES, examples)
    for name, text in {
        "archive_format": "pt2",
        "archive_version": "0",
        ".data/version": "6\n",
        "byteorder": "little",
    }.items():
        writer.add(name, text.encode())


def exported_evaluation(program: Program) -> ExportedProgram:
    """The program in evaluation mode, outputs in plain containers, as an export.

    It is put together from the program's graph; only where that cannot be is it traced once more.
    """
    module = evaluated(program, share=True)
    spec = plain_spec(module.interface.output_specs[1])
    module.__dict__["interface"] = replace(module.interface, output_specs=(spec, spec))
    module.recompile()
    for region in module.modules():
        if isinstance(region, Region):  # inference takes no gradients; torch.export cannot write such blocks
            region.contexts = tuple(c for c in region.contexts if c[0] != "grad")
    inputs = Inputs(module.interface.signature, tuple(program.example_args), program.example_kwargs)
    try:
        return composed(module, inputs)
    except NotComposedError:
        return export_program(module, widened(inputs))


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without content, parameter or not as the given one is."""
    empty = torch.empty(0)
    return torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty


def _tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise RewriteError(f"the program holds {name}, a {type(value).__name__}, which a file cannot")
    return value


def _config(payloads: Mapping[str, tuple[torch.Tensor, str]], folder: str) -> bytes:
    """Where torch finds each tensor, and how it is laid out there."""
    config = {
        name: schema.PayloadMeta(
            path_name=entry.removeprefix(folder),
            is_param=isinstance(tensor, torch.nn.Parameter),
            use_pickle=False,
            tensor_meta=_meta(tensor),
        )
        for name, (tensor, entry) in payloads.items()
    }
    return json.dumps(serialize._dataclass_to_dict(schema.PayloadConfig(config=config))).encode()


def _meta(tensor: torch.Tensor) -> schema.TensorMeta:
    layout = torch.empty_strided(tensor.shape, dense_strides(tensor), dtype=tensor.dtype, device="meta")
    found = serialize.serialize_tensor_meta(layout)
    found.requires_grad = tensor.requires_grad
    found.device = schema.Device(type=tensor.device.type, index=tensor.device.index)
    return found
