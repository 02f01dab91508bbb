"""What a graph from a file may call: an allow-list of operators on tensors and of functions on sizes."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.graph import ops
from rewrite.torch_private import OpOverload, operator_schemas

from .checked import shown

#: What reads or writes files, reaches a tensor's storage or autograd state, or leans on the memory layout of a library.
_DENIED = re.compile(
    r"from_file|set_|set_data|data|resize.*|resize_as.*|record_stream|backward|retain_grad|retains_grad|requires_grad_|rename.*|"
    r"align_.*|refine_names|output_nr|to_mkldnn.*|mkldnn_.*|cudnn_.*|miopen_.*|xnnpack.*|quantize.*|quantized_.*|fbgemm_.*|"
    r"q_.*|int_repr|dequantize.*|sparse_.*|to_sparse.*|coalesce|copy_sparse.*|row_indices.*|col_indices.*|crow_indices.*|"
    r"ccol_indices.*|values.*|indices.*|nested_.*|storage_offset|lift|lift_fresh|pin_memory|is_pinned|.*_backward.*|.*_hook|"
    r"empty_quantized|choose_qparams_optimized|make_.*|special_test.*|sym_constrain_range_for_size_.*"
)
#: Operators with a leading underscore that exports of models hold.
_UNDERSCORED = re.compile(
    r"__\w+__|_to_copy|_softmax|_log_softmax|_safe_softmax|_masked_softmax|_unsafe_view|_unsafe_index|_unsafe_index_put|"
    r"_unsafe_masked_index|_native_batch_norm_legit\w*|_batch_norm_\w+|_scaled_dot_product_\w*attention\w*|_adaptive_avg_pool\dd|"
    r"_weight_norm|_weight_norm_interface|_fused_rms_norm|_fft_\w+|_cdist_forward|_euclidean_dist|_pdist_forward|_convolution|"
    r"_convolution_mode|_embedding_bag|_embedding_bag_forward_only|_conj|_conj_physical|_neg_view|_trilinear|_upsample_\w+|"
    r"_transformer_encoder_layer_fwd|_native_multi_head_attention|_transform_bias_rescale_qkv|_pack_padded_sequence|"
    r"_pad_packed_sequence|_pad_enum|_pad_circular|_cast_\w+|_is_all_true|_is_any_true|_stack|_prelu_kernel|_index_put_impl_?|"
    r"_linalg_(det|eigh|eigvals|slogdet|solve_ex|svd)|_grouped_mm|_int_mm|_addmm_activation|_shape_as_tensor|_reshape_copy|"
    r"_reshape_alias|_logcumsumexp|_unique2?|_local_scalar_dense|_assert_tensor_metadata|_assert_scalar|_assert_async|"
    r"_functional_assert_\w+|_functional_sym_constrain_\w+|_aminmax|_dim_arange|_thnn_fused_(gru|lstm)_cell|_foreach_\w+"
)
_TYPES = re.compile(
    r"(Optional\[|List\[)*(Tensor|number|int|SymInt|float|bool|str|Device|Generator|ScalarType|Layout|MemoryFormat|Dimname)\]*"
)
#: Namespaces of torch's own workings: processes, profiling, compiled code. Any other is a package's.
_OF_TORCH = re.compile(
    r"c10d|c10d_functional|debug_mode_ops|debugprims|export|flex_lib|fsdp|higher_order|inductor|inductor_prims|"
    r"mkl|mkldnn|mkldnn_prepacked|onednn|onnx|onnx_symbolic|profiler|quantization|quantized|rewrite|rngprims|"
    r"sparse|static_runtime|streams|symm_mem|tensorexpr|cuda|xpu|mps|vulkan|metal|nested_tensor|dist_autograd|"
    r"rpc|torchbind|triton"
)
_HIGHER = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_ON_SIZES: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "operator": (
        operator,
        (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs", "and_", "or_", "xor", "not_"),
            *("eq", "ne", "lt", "le", "gt", "ge", "getitem", "index"),
        ),
    ),
    "math": (math, ("ceil", "floor", "trunc", "sqrt")),
    "rewrite": (ops, ("device_of", "dtype_of", "dtype_limit")),
    "torch": (
        torch,
        ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "_sym_sqrt"),
    ),
}


def operator_named(name: Any) -> OpOverload:
    """The operator ``namespace.name.overload``, if it is one that a file may name.

    Those are ATen's functional and in-place operators on tensors, and the custom operators of packages that are imported.
    """
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        raise RewriteError(f"it uses the operator {shown(name)}, which is no name of one")
    namespace, base, overload = parts
    if not _is_registered(namespace, base, overload):
        raise RewriteError(f"it uses the operator {name}, which this torch does not have")
    found = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    if not isinstance(found, OpOverload) or not _is_allowed(found):
        raise RewriteError(f"it uses the operator {name}, which does more than compute on tensors")
    return found


def _is_registered(namespace: str, base: str, overload: str) -> bool:
    """Asked of the dispatcher before any attribute is looked up: ``torch.ops`` is a module with attributes of its own."""
    schemas = operator_schemas(f"{namespace}::{base}")
    return any((schema.overload_name or "default") == overload for schema in schemas)


@cache
def _is_allowed(found: OpOverload) -> bool:
    namespace, base = found._schema.name.split("::")
    if namespace not in ("aten", "prims"):
        return not _OF_TORCH.fullmatch(namespace) and not namespace.startswith("_")
    listed = _UNDERSCORED.fullmatch(base) if base.startswith("_") else not _DENIED.fullmatch(base)
    plain = all(_TYPES.fullmatch(str(argument.type)) for argument in found._schema.arguments)
    return bool(listed) and plain


def function_name(target: Any) -> str:
    """The name under which a file refers to a function of a graph. Raises RewriteError for one that it cannot."""
    if isinstance(target, OpOverload):
        if not _is_allowed(target):
            raise RewriteError(f"the program calls {target}, which does more than compute on tensors: no file names it")
        return str(target)
    for prefix, (home, names) in _ON_SIZES.items():
        name = getattr(target, "__name__", "")
        if name in names and getattr(home, name, None) is target:
            return f"{prefix}:{name}"
    raise RewriteError(f"a call of {target} cannot be written to a file")


def function_named(name: Any) -> Callable[..., Any]:
    """The function that ``function_name`` named."""
    prefix, colon, rest = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon:
        return operator_named(name)
    home, names = _ON_SIZES.get(prefix, (None, ()))
    if rest not in names:
        raise RewriteError(f"it calls {shown(name)}, which is no operator on tensors or sizes")
    found: Callable[..., Any] = getattr(home, rest)
    return found


def check_call(target: Any, args: Any, kwargs: Any) -> None:
    """Refuse a call on sizes whose result could be larger than any size, and arguments that are no numbers or nodes."""
    if isinstance(target, OpOverload) or target in (operator.getitem, torch.sym_sum):
        return
    if any(isinstance(value, list | tuple | dict | slice) for value in (*args, *kwargs.values())):
        raise RewriteError(f"it calls {target.__name__} with a container")
    if target is operator.pow and (len(args) != 2 or type(args[1]) not in (int, float) or not -8 <= args[1] <= 8):
        raise RewriteError("it raises a size to a power that is no small number")


def serialized_target(name: Any) -> None:
    """Refuse a call target as torch.export writes it, unless it is on the lists here."""
    if not isinstance(name, str):
        raise RewriteError(f"it calls {shown(name)}")
    head, _, rest = name.rpartition(".")
    if head == "torch.ops.higher_order" and rest in _HIGHER:
        return
    if name.startswith("torch.ops."):
        operator_named(name.removeprefix("torch.ops."))
        return
    prefix = {"_operator": "operator", "math": "math", "torch": "torch"}.get(head, head)
    if rest not in _ON_SIZES.get(prefix, (None, ()))[1] or prefix == "rewrite":
        raise RewriteError(f"it calls {shown(name)}, which is no operator on tensors or sizes")
