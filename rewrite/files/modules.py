"""Layer graphs as JSON: graphs, layers and calling conventions to plain values and back, by name and never by pickle.

Reading resolves nothing but operators registered with torch, a few functions for sizes, and layer classes of torch.nn,
of this package and of installed pass packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.graph.layers import AutogradFunction, Constants, FunctionCall
from rewrite.graph.program import Container
from rewrite.graph.regions import Region
from rewrite.sources.compat import import_mended
from rewrite.sources.installed import is_installed
from rewrite.torch_private import pytree

from .graphs import decode_graph, encode_graph
from .values import Json, decode, encode

_INTERNAL = frozenset({*nn.Module().__dict__, "graphs", "runs", "_forward_pre_hooks", "_is_full_backward_hook"})


def encode_module(module: nn.Module, path: str = "", seen: dict[int, str] | None = None) -> Json:
    """A layer with everything below it; tensors are referred to by their path, shared modules by the first one's."""
    seen = {} if seen is None else seen
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = path
    kind = type(module)
    hidden = module.names if isinstance(module, Constants) else ("call",)
    extra = {k: encode(v) for k, v in vars(module).items() if path and k not in _INTERNAL and k not in hidden}
    entry = {
        "class": f"{kind.__module__}:{kind.__qualname__}" if path else "",
        "training": module.training,
        "parameters": {
            n: p is not None and p.requires_grad if p is not None else None for n, p in module._parameters.items()
        },
        "buffers": {
            n: None if b is None else n not in module._non_persistent_buffers_set for n, b in module._buffers.items()
        },
        "attributes": extra,
        "children": {
            n: encode_module(c, f"{path}.{n}" if path else n, seen) for n, c in module._modules.items() if c is not None
        },
    }
    if isinstance(module, AutogradFunction):
        entry["call"] = _encode_call(module, path)
    if isinstance(module, Region):
        entry["graphs"] = {mode: encode_graph(graph) for mode, graph in module.graphs.items()}
    return entry


def decode_module(
    data: Json, tensors: Mapping[str, torch.Tensor], path: str = "", seen: dict[str, nn.Module] | None = None
) -> nn.Module:
    """The module that ``encode_module`` wrote, with its tensors from ``tensors`` by path."""
    seen = {} if seen is None else seen
    if "same" in data:
        return seen[data["same"]]
    kind = layer_class(data["class"]) if data["class"] else Container
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    seen[path] = made
    for name, value in data["attributes"].items():
        made.__dict__[name] = decode(value)
    prefix = f"{path}." if path else ""
    for name, grad in data["parameters"].items():
        tensor = tensors[prefix + name] if grad is not None else None
        made._parameters[name] = (
            tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=grad)
        )
    for name, persistent in data["buffers"].items():
        made._buffers[name] = tensors[prefix + name] if persistent is not None else None
        if persistent is False:
            made._non_persistent_buffers_set.add(name)
    if isinstance(made, Constants):
        made.__dict__.update({name: tensors[prefix + name] for name in made.names})
    for name, child in data["children"].items():
        made._modules[name] = decode_module(child, tensors, prefix + name, seen)
    if isinstance(made, Region):
        made.__dict__["graphs"] = {mode: decode_graph(g) for mode, g in data["graphs"].items()}
        made.recompile()
    if isinstance(made, AutogradFunction):
        made.call = _decode_call(data["call"])
    made.training = data["training"]
    return made


def _encode_call(module: AutogradFunction, path: str) -> Json:
    call = module.call
    home = call.function.__module__
    if not is_installed(home) or "<" in call.function.__qualname__:
        raise RewriteError(
            f"{path} calls {module.extra_repr()}, code of your own that a file cannot hold: "
            "graft the program back onto your class and save that"
        )
    return {
        "function": f"{home}:{call.function.__qualname__}",
        "spec": pytree.treespec_dumps(call.spec),
        "constants": encode(call.constants),
        "tensor_places": list(call.tensor_places),
        "output_places": list(call.output_places),
    }


def _decode_call(data: Json) -> FunctionCall:
    home, _, qualified = data["function"].partition(":")
    if not is_installed(home):
        raise RewriteError(f"the file calls {data['function']}, which is in no installed package")
    found: Any = import_mended(home)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, torch.autograd.Function)):
        raise RewriteError(f"the file names {data['function']} as an autograd function, and it is none")
    return FunctionCall(
        found,
        pytree.treespec_loads(data["spec"]),
        decode(data["constants"]),
        tuple(data["tensor_places"]),
        output_places=tuple(data["output_places"]),
    )


def layer_class(name: str) -> type[nn.Module]:
    """The class ``module:name``, if it is a layer of torch.nn, of this package or of an installed pass package."""
    module, _, qualified = name.partition(":")
    trusted = {
        "rewrite",
        *(
            e.value.partition(":")[0].partition(".")[0]
            for group in ("rewrite.passes", "rewrite.backends")
            for e in entry_points(group=group)
        ),
    }
    if not (module.startswith("torch.nn.modules.") or module.partition(".")[0] in trusted):
        raise RewriteError(f"the file holds a layer of class {name}: install the pass package that it comes from")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise RewriteError(f"the file holds a layer of class {name}, which cannot be found here") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RewriteError(f"the file names {name} as a layer, and it is none")
    return found
