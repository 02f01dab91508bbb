"""Layers as JSON and back, by the names of their classes: those of torch.nn, of this package and of pass packages."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.graph.layers import AutogradFunction, Constants, FunctionCall, ModalOperator
from rewrite.graph.program import Container, LayerGraph
from rewrite.graph.regions import Region
from rewrite.sources.compat import import_mended
from rewrite.sources.installed import Installed
from rewrite.torch_private import OpOverload

from . import checked
from .checked import Json
from .graphs import decode_graph, encode_graph
from .specs import decode_spec, encode_spec
from .values import decode, encode

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


class Decoder:
    """Rebuilds modules from what ``encode_module`` wrote, with their tensors by path."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], installed: Installed) -> None:
        self._tensors = tensors
        self._installed = installed
        self._classes: dict[str, type[nn.Module]] = {}
        self._trusted = _trusted_packages()
        self._made: dict[str, nn.Module] = {}

    def module(self, data: Json, path: str = "") -> nn.Module:
        """The module at a path with everything below it. Raises RewriteError for what is no layer of the kinds known."""
        if "same" in checked.table(data, "module"):
            return self._same(data["same"])
        checked.table(data, "module", "class", "training", "parameters", "buffers", "attributes", "children")
        kind = self.layer_class(data["class"]) if path else Container
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        for name, value in checked.table(data["attributes"], "attributes").items():
            made.__dict__[_attribute(kind, name)] = decode(value)
        self._fill(made, data, f"{path}." if path else "")
        for name, child in checked.table(data["children"], "children").items():
            made._modules[checked.part(name)] = self.module(child, f"{path}.{name}" if path else name)
        self._finish(made, data)
        _check_whole(made, path)
        made.training = checked.truth(data["training"], "mode")
        self._made[path] = made
        return made

    def _same(self, path: Json) -> nn.Module:
        if not isinstance(path, str) or path not in self._made:
            raise RewriteError(f"it shares the module {checked.shown(path)} before it is there")
        return self._made[path]

    def _fill(self, made: nn.Module, data: Json, prefix: str) -> None:
        for name, grad in checked.table(data["parameters"], "parameters").items():
            made._parameters[checked.part(name)] = None if grad is None else self._parameter(prefix + name, grad)
        for name, persistent in checked.table(data["buffers"], "buffers").items():
            made._buffers[checked.part(name)] = None if persistent is None else self._tensor(prefix + name)
            if persistent is False:
                made._non_persistent_buffers_set.add(name)
        if isinstance(made, Constants):
            names = made.__dict__.get("names")
            for name in names if isinstance(names, tuple) else (None,):
                made.__dict__[_attribute(Constants, name)] = self._tensor(f"{prefix}{name}")

    def _tensor(self, path: str) -> torch.Tensor:
        if path not in self._tensors:
            raise RewriteError(f"the tensor {checked.shown(path)} is not in it")
        return self._tensors[path]

    def _parameter(self, path: str, grad: Json) -> nn.Parameter:
        tensor, trained = self._tensor(path), checked.truth(grad, "requires_grad")
        if trained and not (tensor.is_floating_point() or tensor.is_complex()):
            raise RewriteError(f"its parameter {checked.shown(path)} is of dtype {tensor.dtype} and cannot be trained")
        return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=trained)

    def _finish(self, made: nn.Module, data: Json) -> None:
        if isinstance(made, Region):
            graphs = checked.table(data.get("graphs"), "graphs of a region")
            if graphs.keys() not in ({"any"}, {"train", "eval"}):
                raise RewriteError("a region of it has no graph for each mode")
            _check_contexts(made.__dict__.get("contexts"))
            made.__dict__["graphs"] = {mode: decode_graph(g) for mode, g in graphs.items()}
            made.recompile()
        if isinstance(made, AutogradFunction):
            made.call = _decode_call(data.get("call"), self._installed)
        if isinstance(made, ModalOperator):
            _check_modal(made)

    def layer_class(self, name: Json) -> type[nn.Module]:
        """The class ``module:name``, if it is a layer of torch.nn, of this package or of an installed pass package."""
        if not isinstance(name, str) or name not in self._classes:
            self._classes[name] = self._found_class(checked.text(name, "class"))
        return self._classes[name]

    def _found_class(self, name: str) -> type[nn.Module]:
        module, _, qualified = name.partition(":")
        trusted = module.startswith("torch.nn.modules.") or module.partition(".")[0] in self._trusted
        if not trusted:
            raise RewriteError(f"it holds a layer of class {checked.shown(name)}: install the pass package it comes from")
        if not all(part.isidentifier() for part in qualified.split(".")):
            raise RewriteError(f"it names {checked.shown(name)} as a layer, and it is none")
        if not self._installed.defines(module, qualified.partition(".")[0]):
            raise RewriteError(f"it holds a layer of class {checked.shown(name)}, which cannot be found here")
        found = _attribute_of(importlib.import_module(module), qualified)
        if not (isinstance(found, type) and issubclass(found, nn.Module)) or issubclass(found, LayerGraph):
            raise RewriteError(f"it names {checked.shown(name)} as a layer, and it is none")
        return found


def _check_whole(made: nn.Module, path: str) -> None:
    """Refuse a layer without the attributes that its class says it has, or that it cannot be described by."""
    missing = [name for name in getattr(type(made), "__constants__", ()) if not hasattr(made, name)]
    try:
        made.extra_repr()
    except Exception:  # the class's own code, on what the file says
        missing = missing or ["what describes it"]
    if missing:
        raise RewriteError(f"its layer {checked.shown(path)} lacks {missing[0]}")


def _trusted_packages() -> frozenset[str]:
    groups = ("rewrite.passes", "rewrite.backends")
    return frozenset({"rewrite", *(e.module.partition(".")[0] for group in groups for e in entry_points(group=group))})


def _attribute(kind: type[nn.Module], name: Json) -> str:
    """The name of a plain attribute: none that stands for a method, a hook or a child."""
    if not isinstance(name, str) or not name.isidentifier() or name in _INTERNAL or callable(getattr(kind, name, None)):
        raise RewriteError(f"it sets {checked.shown(name)} on a {kind.__name__}, which is no plain attribute")
    return name


def _attribute_of(home: Any, qualified: str) -> Any:
    for part in qualified.split("."):
        home = getattr(home, part, None)
    return home


def _check_contexts(contexts: Any) -> None:
    """The contexts of a region: ``grad`` on or off, ``autocast`` with its settings."""
    for context in contexts if isinstance(contexts, tuple) else (None,):
        kind, settings = context if isinstance(context, tuple) and len(context) == 2 else (None, None)
        grad = kind == "grad" and isinstance(settings, tuple) and [type(s) for s in settings] == [bool]
        values = settings if isinstance(settings, tuple) and len(settings) == 4 else (None, "", None, None)
        if not grad and not (kind == "autocast" and isinstance(values[1], torch.dtype | None)):
            raise RewriteError(f"a region of it stands in the context {checked.shown(context)}, which is none")


def _check_modal(made: ModalOperator) -> None:
    values = made.__dict__
    overload, modal, places = (values.get(key) for key in ("overload", "modal", "places"))
    whole = isinstance(overload, OpOverload) and isinstance(modal, dict) and isinstance(places, dict)
    pairs = isinstance(modal, dict) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in modal.values())
    if not whole or not pairs:
        raise RewriteError("an operator of it that depends on the mode does not say how")


def _encode_call(module: AutogradFunction, path: str) -> Json:
    call = module.call
    home = call.function.__module__
    if not Installed.here().holds(home) or "<" in call.function.__qualname__:
        raise RewriteError(
            f"{path} calls {module.extra_repr()}, code of your own that a file cannot hold: "
            "graft the program back onto your class and save that"
        )
    return {
        "function": f"{home}:{call.function.__qualname__}",
        "spec": encode_spec(call.spec),
        "constants": encode(call.constants),
        "tensor_places": list(call.tensor_places),
        "output_places": list(call.output_places),
    }


def _decode_call(data: Json, installed: Installed) -> FunctionCall:
    checked.table(data, "call", "function", "spec", "constants", "tensor_places", "output_places")
    name = checked.text(data["function"], "function")
    home, _, qualified = name.partition(":")
    known = all(part.isidentifier() for part in qualified.split("."))
    if not known or not installed.defines(home, qualified.partition(".")[0]):
        raise RewriteError(f"it calls {checked.shown(name)}, which is in no installed package")
    found = _attribute_of(import_mended(home), qualified)
    if not (isinstance(found, type) and issubclass(found, torch.autograd.Function)):
        raise RewriteError(f"it names {checked.shown(name)} as an autograd function, and it is none")
    spec, constants = decode_spec(data["spec"]), decode(data["constants"])
    if not isinstance(constants, tuple) or len(constants) != spec.num_leaves:
        raise RewriteError(f"its call of {checked.shown(name)} does not fit its arguments")
    places = [checked.whole(p, "place", 0, len(constants) - 1) for p in checked.items(data["tensor_places"], "places")]
    outputs = [checked.whole(p, "place", 0) for p in checked.items(data["output_places"], "places")]
    return FunctionCall(spec, constants, tuple(places), output_places=tuple(outputs), function=found)
