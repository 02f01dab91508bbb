"""Every private name of torch that the engine leans on, with the reason; no other file imports one.

torch may rename them in any release: a test resolves each and says which is gone, and `tests/test_layout.py` finds those
that are not listed. Names that stand in files of torch's own formats (`torch._utils._rebuild_tensor_v2` in a pickle) are
not here: they are part of what a file says, and stay as long as files do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import _subclasses as fake_tensors
from torch._dispatch.python import enable_python_dispatcher
from torch._export.serde import schema, serialize
from torch._export.verifier import TrainingIRVerifier
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "ASSERTION",
    "OPDEFS",
    "DimDynamic",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "PyTorchFileReader",
    "ShapeEnv",
    "TorchDispatchMode",
    "TrainingIRVerifier",
    "_BatchNorm",
    "_DropoutNd",
    "assert_true",
    "compiled_saved",
    "compiled_within",
    "enable_python_dispatcher",
    "fake_tensors",
    "frame_compiler",
    "guards_code",
    "is_composite",
    "is_traced",
    "leave_transforms",
    "make_fx",
    "memory_of",
    "onnx_operators_known",
    "operator_schemas",
    "output_spec",
    "plain_tensors",
    "python_dispatcher",
    "pytree",
    "schema",
    "serialize",
    "serialized",
    "set_guards_code",
    "size_symbol",
    "top_saved_hooks",
    "torch_c",
    "transform_depth",
]

torch_c = torch._C
PyTorchFileReader = torch._C.PyTorchFileReader
plain_tensors = _disable_current_modes
python_dispatcher = enable_python_dispatcher
frame_compiler = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""What compiles the Python functions that are called from here, or None; a function that asks is itself compiled, so that
only a builtin can."""
operator_schemas = torch._C._jit_get_schemas_for_operator

#: What is imported, by its full name, and why a public name will not do.
NAMES: dict[str, str] = {
    "torch._C.DispatchKey.CompositeImplicitAutograd": "which operators are made of others: ONNX has none for some",
    "torch._C.DisableTorchFunction": "a size decision is computed with plain tensors inside a trace",
    "torch._C.PyTorchFileReader": "a zip of tensors is listed, and its pickle scanned, before anything is loaded",
    "torch._C._VariableFunctionsClass": "pickles name functions of torch as attributes of this class",
    "torch._C._autograd._top_saved_tensors_default_hooks": "what hooks on saved tensors leave goes to those around",
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": "whether torch.compile is at work around a skipped function",
    "torch._C._functorch.get_interpreter_stack": "how many function transforms are being run, before a vmap's steps are",
    "torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth": "a vmap whose steps stopped halfway is left",
    "torch._C._jit_get_schemas_for_operator": "whether an operator is registered is asked before its name is looked up",
    "torch._dispatch.python.enable_python_dispatcher": "layers run on fake tensors as in torch.export: 2.11 needs it",
    "torch._dynamo.source.ConstantSource": "a dynamic size read from a file needs an origin to be created",
    "torch._export.serde.schema.ExportedProgram": "an export's graph is judged field by field before torch builds it",
    "torch._export.serde.schema.PayloadMeta": "where torch.export.load finds a tensor in an archive of ours",
    "torch._export.serde.schema.ScalarType": "the dtypes of an export's tensors",
    "torch._export.serde.serialize.ExportedProgramDeserializer": "an export's graph is built without torch.export.load",
    "torch._export.serde.serialize._dataclass_to_dict": "tables of tensors are written as torch.export.load reads them",
    "torch._export.serde.serialize._dict_to_dataclass": "the graph that was judged is the graph that is built",
    "torch._export.serde.serialize.deserialize_scalar_type": "the dtypes of an export's tensors",
    "torch._export.serde.serialize.serialize": "an export without torch's archive writer, which aborts on a full disk",
    "torch._export.serde.serialize.serialize_tensor_meta": "tables of tensors are written as torch.export.load reads them",
    "torch._export.serde.serialize.canonicalize": "computed and dropped, at more than half of what writing an export costs",
    "torch._export.verifier.TrainingIRVerifier": "an export of this kind may write into its values, as layers do",
    "torch._functorch.config.activation_memory_budget": "how much a compiled model may keep is set here alone",
    "torch._library.custom_ops.OPDEFS": "which module defines a custom operator, so that a reader imports it first",
    "torch._ops.OpOverload": "the target of an ATen node; torch.export's graphs are made of them",
    "torch._subclasses.FakeTensor": "libraries ask for it by this name, and find none in an eager view of a trace",
    "torch._subclasses.functional_tensor.FunctionalTensor": "hooks on saved tensors are traced on these",
    "torch._subclasses.FakeTensorMode": "shapes and dtypes without computing, for a capture that runs nothing",
    "torch.fx.experimental.proxy_tensor.make_fx": "layers and the steps of a vmap are traced as the operators that they run",
    "torch.fx.experimental.symbolic_shapes.DimDynamic": "a dynamic size read from a file is dynamic",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv": "dynamic sizes of fake tensors live in one",
    "torch.fx.graph._format_target": "torch.fx writes attributes named like Python keywords as they are",
    "torch.nn.modules.batchnorm._BatchNorm": "the one class above all batch norms",
    "torch.nn.modules.dropout._DropoutNd": "the one class above all dropouts",
    "torch.onnx._internal._lazy_import.onnxscript_apis": "its table of operators is made once, not for every file",
    "torch.utils._python_dispatch.TorchDispatchMode": "exact arithmetic turns every operator's dtype into float64",
    "torch.utils._python_dispatch._disable_current_modes": "a size decision is computed with real kernels inside a trace",
    "torch.utils._pytree.tree_flatten": "the containers of a model's inputs and outputs, as torch.export sees them",
    "torch.utils._pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE": "which output classes are registered, before a file names one",
    "torch.utils._pytree.SUPPORTED_SERIALIZED_TYPES": "whether reading a container calls what its context names",
    "torch._assert_async": "an assertion that stands in a graph: inputs decide as the example inputs did",
    "torch.utils._pytree.tree_map": "as above",
    "torch.utils._pytree.tree_unflatten": "as above",
}

#: What is read of objects, by the attribute's name: where, and why.
ATTRIBUTES: dict[str, str] = {
    "_buffers": "nn.Module: the buffers that are its own, None included, in order",
    "_constants": "ExportedProgram: emptied before it is written, since its tensors are stored apart from its graph",
    "_cdata": "UntypedStorage: which tensors of a trace, which have no address, share memory",
    "_example_inputs": "as above",
    "_state_dict": "as above",
    "_codegen": "fx.Graph: the containers of an export's output",
    "_forward_hooks": "nn.Module: the hooks that a trace of it holds already",
    "_forward_hooks_always_called": "nn.Module: a hook of ours that is called where the forward raised, too",
    "_forward_pre_hooks": "nn.Module: hooks of ours; whether something is computed before each call",
    "_forward_pre_hooks_with_kwargs": "nn.Module: a hook of ours that is given the keywords, too",
    "_guards_code": "ExportedProgram: the conditions on sizes under which a capture holds",
    "_init_fn": "CustomOpDef: the module that defines a custom operator",
    "_modules": "nn.Module: the children that are its own, None included, in order",
    "_non_persistent_buffers_set": "nn.Module: which buffers a state_dict leaves out",
    "_overloadpacket": "OpOverload: one operator whatever its overload",
    "_parameters": "nn.Module: the parameters that are its own, None included, in order",
    "_version": "Tensor: whether something was written into it between two times that autograd kept it",
    "_schema": "OpOverload: an operator's arguments by name, and which of them it writes",
}


def guards_code(exported: ExportedProgram) -> list[str]:
    """The conditions on sizes under which an export holds, as Python text.

    There is no default: a program without its conditions would take sizes that it is wrong for.
    """
    return list(exported._guards_code)


#: The operator that raises its text where a tensor is false.
ASSERTION = torch.ops.aten._assert_async.msg


def assert_true(condition: Tensor, text: str) -> None:
    """Raise ``text`` where a tensor is false, in a trace: when its graph is run."""
    torch._assert_async(condition, text)


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common, those without an address included."""
    return int(tensor.untyped_storage()._cdata)


def set_guards_code(exported: ExportedProgram, guards: list[str]) -> None:
    """Let an export hold under these conditions on sizes."""
    exported._guards_code = guards


def serialized(exported: ExportedProgram) -> bytes:
    """The graph of an export in torch's format.

    torch makes the canonical form of it, by a deep copy of all, to see whether there is one, and drops it: that is left out.
    """
    with mock.patch.object(serialize, "canonicalize", lambda program, constants=None: program):
        return serialize.serialize(exported).exported_program


def output_spec(graph: Graph) -> pytree.TreeSpec:
    """The containers of the output of an export's graph, whose leaves the graph returns."""
    found: pytree.TreeSpec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    return found


def size_symbol(environment: ShapeEnv, name: str, example: int) -> torch.SymInt:
    """A new dynamic size of this example value."""
    from torch._dynamo.source import ConstantSource  # takes longer to import than the rest of torch together

    source = ConstantSource(name)
    symbol = environment.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    made = environment.create_symintnode(symbol, hint=example, source=source)
    assert isinstance(made, torch.SymInt)
    return made


def transform_depth() -> int:
    """How many function transforms (`torch.vmap`) are being run."""
    return len(torch_c._functorch.get_interpreter_stack() or ())


def leave_transforms(depth: int) -> None:
    """Leave the function transforms beyond this many."""
    torch_c._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def top_saved_hooks() -> tuple[Any, Any] | None:
    """The innermost hooks on saved tensors, pack and unpack; None where there are none."""
    found: tuple[Any, Any] | None = torch_c._autograd._top_saved_tensors_default_hooks(True)
    return found


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for one of a trace and has no values."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def compiled_saved(outputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What compiled functions keep for the backward of their outputs; hooks on saved tensors do not see those that were
    compiled with hooks of their own.
    """
    todo, seen = [t.grad_fn for t in outputs], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(each for each, _ in node.next_functions)
            if type(node).__name__ == "CompiledFunctionBackward":
                yield from (*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ()))  # type: ignore[attr-defined]


@contextlib.contextmanager
def compiled_within(budget: float) -> Iterator[None]:
    """Let what is compiled inside keep at most this fraction of what it would for its backward; 1.0 is no limit."""
    from torch._functorch import config  # takes long to import, and nobody else needs it

    with config.patch(activation_memory_budget=budget):
        yield


@contextlib.contextmanager
def onnx_operators_known() -> Iterator[frozenset[str]]:
    """Let ONNX's exporter find its operators without reading the source of each anew, a fifth of a small model's time.

    Gives the names of those that it has a function for.
    """
    from torch.onnx._internal import _lazy_import  # takes long to import, and nobody else needs it

    apis: Any = _lazy_import.onnxscript_apis  # type: ignore[attr-defined]
    known = functools.partial(_operators, apis.get_torchlib_ops)
    with mock.patch.object(apis, "get_torchlib_ops", known):
        yield frozenset(found.qualified_name for found in known())


@functools.cache
def _operators(make: Callable[[], list[Any]]) -> list[Any]:
    return make()


def is_composite(target: OpOverload) -> bool:
    """Whether an operator is made of others, for autograd as well, and no kernel of its own."""
    return target.has_kernel_for_dispatch_key(torch_c.DispatchKey.CompositeImplicitAutograd)
