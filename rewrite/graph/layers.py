"""Layers of the layer graph that ``torch.nn`` has no class for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from rewrite.torch_private import OpOverload, pytree


class ScaledDotProductAttention(nn.Module):
    """softmax(q kᵀ · scale + mask) v, with dropout of the attention weights in training.

    ``scale`` None means 1/√(head size); ``enable_gqa`` repeats key and value heads to the query's number.
    Shapes: q [..., heads, queries, size], k and v [..., heads, keys, size].
    """

    def __init__(
        self, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False
    ) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        dropout_p = self.dropout_p if self.dropout_p and self.training else 0.0
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa
        )

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}, scale={self.scale}"


class TransposedLinear(nn.Module):
    """y = x W + b with W [in_features, out_features], as GPT-2's Conv1D keeps it; b [out_features] or None.

    With a bias x is flattened to a matrix for one ``addmm``, without one it is a ``matmul``: what such modules call.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x W + b with another W of the same shape."""
        if self.bias is None:
            return x @ weight
        rows = torch.addmm(self.bias, x.reshape(-1, self.in_features), weight)
        return rows.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Scale(nn.Module):
    """y = factor · x, a number that is not trained."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


class BiasedRMSNorm(nn.RMSNorm):
    """y = (offset + weight) · x / √(mean x² + eps) + bias over the last axes, or over axis 1 for ``channel_axis`` 1.

    ``weight`` and ``bias`` have shape ``normalized_shape``, or are None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: tuple[int, ...],
        eps: float | None,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        channel_axis: int = -1,
        offset: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine=False)
        self.weight = weight  # type: ignore[assignment]
        self.register_parameter("bias", bias)
        self.elementwise_affine = weight is not None
        self.offset = offset
        self.channel_axis = channel_axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x if self.channel_axis == -1 else x.movedim(self.channel_axis, -1)
        gain = self.weight + self.offset if self.weight is not None and self.offset else self.weight
        y = nn.functional.rms_norm(last, self.normalized_shape, gain, self.eps)
        y = y if self.bias is None else y + self.bias
        return y if self.channel_axis == -1 else y.movedim(-1, self.channel_axis)


class ChannelsLayerNorm(nn.LayerNorm):
    """y = (x - mean) / √(variance + eps) over axis 1 of a channels-first map [N, channels, ...], without weight and bias."""

    channel_axis = 1

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ModalOperator(nn.Module):
    """An ATen operator some of whose arguments depend on the mode, such as ``lstm(..., train)``.

    Called with one tuple: the operator's arguments in schema order, those in ``modal`` left None.
    """

    def __init__(self, overload: OpOverload, modal: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__()
        self.overload = overload
        self.modal = dict(modal)
        self.places = {a.name: i for i, a in enumerate(overload._schema.arguments)}

    def forward(self, arguments: tuple[Any, ...]) -> Any:
        values = list(arguments)
        for name, (train, evaluation) in self.modal.items():
            values[self.places[name]] = train if self.training else evaluation
        return self.overload(*values)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModalOperator:
        made = ModalOperator(self.overload, self.modal)
        made.training = self.training
        memo[id(self)] = made
        return made

    def extra_repr(self) -> str:
        return f"{self.overload}, " + ", ".join(f"{k}={t}/{e}" for k, (t, e) in self.modal.items())


@dataclass
class PackedCall:
    """A call's arguments: their structure, the constants and where the tensors stand among the leaves; so its output."""

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]
    tensor_places: tuple[int, ...]
    output_spec: pytree.TreeSpec | None = None
    output_constants: tuple[Any, ...] = ()
    output_places: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing changes it after the trace

    @property
    def name(self) -> str:
        """What is called, the same in every trace of a model."""
        raise NotImplementedError

    def arguments(self, tensors: Sequence[Any]) -> Any:
        """The arguments, with these tensors (or what stands for them) in their places."""
        leaves = list(self.constants)
        for place, tensor in zip(self.tensor_places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass
class FunctionCall(PackedCall):
    """A call ``function.apply(*args)``."""

    function: type[torch.autograd.Function] = field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


class AutogradFunction(nn.Module):
    """Calls a user's own autograd function; its forward and backward are opaque to passes."""

    def __init__(self, call: FunctionCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        outputs = self.call.function.apply(*self.call.arguments(list(tensors)))
        leaves = pytree.tree_leaves(outputs)
        return [leaves[i] for i in self.call.output_places]

    def extra_repr(self) -> str:
        return self.call.name


class Constants(nn.Module):
    """Tensors that a model's code holds as constants. They move with the module but keep their dtype."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        self.__dict__.update(tensors)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Constants:
        super()._apply(fn, recurse)
        for name in self.names:
            tensor = self.__dict__[name]
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            self.__dict__[name] = tensor.to(device)
        return self
