"""Layer graphs as JSON: graphs, layers and calling conventions to plain values and back, by name and never by pickle.

Reading resolves nothing but operators registered with torch, a few functions for sizes, and layer classes of torch.nn,
of this package and of installed pass packages.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from rewrite.errors import RewriteError
from rewrite.frontend.functions import AutogradFunction, FunctionCall
from rewrite.frontend.skeleton import Constants
from rewrite.graph import ops
from rewrite.graph.conditions import Condition
from rewrite.graph.interface import Argument, Interface
from rewrite.graph.program import Container
from rewrite.graph.regions import Region
from rewrite.sources.pickle_vet import import_mended

Json = Any
_META = ("nn_module_stack", "whole", "provenance", "modes", "aligned")
_INTERNAL = frozenset({*nn.Module().__dict__, "graphs", "runs", "_forward_pre_hooks", "_is_full_backward_hook"})
_PLAIN = (bool, int, str, type(None))
_SYMBOLIC = ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")


def encode(value: Any) -> Json:
    """A literal (or node) of a graph or an attribute of a layer as JSON. Raises RewriteError for anything else."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch._ops.OpOverload):
        return {"op": str(value)}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    raise RewriteError(f"a {type(value).__name__} cannot be written to a file: {value!r:.80}")


def decode(value: Json, nodes: Mapping[str, Node] | None = None) -> Any:
    """The value that ``encode`` wrote; nodes are looked up by name."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "node":
        assert nodes is not None
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind in ("dtype", "layout", "memory_format"):
        found = getattr(torch, content)
        if not isinstance(found, getattr(torch, kind)):
            raise RewriteError(f"the file names {content!r} as a {kind}")
        return found
    if kind == "device":
        return torch.device(content)
    if kind == "op":
        return operator_named(content)
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in content)
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in content}
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in content))
    raise RewriteError(f"the file holds an unknown kind of value: {kind}")


def operator_named(name: str) -> torch._ops.OpOverload:
    """The operator ``namespace.name.overload`` that is registered with torch."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise RewriteError(f"the file uses the operator {name}, which this torch does not have")
    return found


def operator_homes(module: nn.Module, graph: Graph) -> list[str]:
    """The Python modules that define the custom operators of a layer graph: importing one registers its operators."""
    graphs = [graph, *(g for part in module.modules() if isinstance(part, Region) for g in part.graphs.values())]
    names = {node.target._schema.name for g in graphs for node in g.nodes
             if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")}
    known = {name: OPDEFS[name] for name in names if name in OPDEFS}
    return sorted({definition._init_fn.__module__ for definition in known.values()})


def import_homes(homes: list[str]) -> None:
    """Import those of the modules that belong to installed packages."""
    for home in homes:
        if is_installed(home):
            import_mended(home)


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for prefix, home in (("operator", operator), ("math", math), ("rewrite", ops), ("torch", torch)):
        name = getattr(target, "__name__", "")
        if getattr(home, name, None) is target:
            return f"{prefix}:{name}"
    raise RewriteError(f"a call of {target} cannot be written to a file")


def _function_named(name: str) -> Callable[..., Any]:
    prefix, _, rest = name.partition(":")
    if not rest:
        return operator_named(name)
    home = {"operator": operator, "math": math, "rewrite": ops, "torch": torch}.get(prefix)
    allowed = prefix != "torch" or rest in _SYMBOLIC
    if home is None or not allowed or rest.startswith("_") or not callable(getattr(home, rest, None)) \
            or rest in ("attrgetter", "methodcaller", "itemgetter", "call"):
        raise RewriteError(f"the file calls {name}, which is no operator")
    found: Callable[..., Any] = getattr(home, rest)
    return found


def encode_graph(graph: Graph) -> Json:
    """A graph as a list of nodes."""
    nodes = []
    for node in graph.nodes:
        target = _function_name(node.target) if node.op == "call_function" else str(node.target)
        meta = {k: encode(_plain_meta(k, node.meta[k])) for k in _META if k in node.meta}
        nodes.append({"name": node.name, "op": node.op, "target": target, "args": encode(node.args),
                      "kwargs": encode(dict(node.kwargs)), "meta": meta, "value": _encode_value(node.meta.get("val"))})
    return nodes


def _plain_meta(key: str, value: Any) -> Any:
    if key == "nn_module_stack":
        return {k: (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
                for k, (path, kind) in value.items()}
    return value


def _encode_value(value: Any) -> Json:
    """For a tensor (or several): its dtype and sizes, dynamic ones as ["name", example]."""
    if isinstance(value, tuple | list):
        return [_encode_value(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [int(s) if isinstance(s, int) or s.node.expr.is_number else [str(s.node.expr), int(s.node.hint)]
             for s in value.shape]
    return {"dtype": encode(value.dtype), "sizes": sizes, "device": str(value.device)}


def decode_graph(data: Json) -> Graph:
    """The graph that ``encode_graph`` wrote."""
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in data:
        if entry["op"] not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise RewriteError(f"the file's graph holds a node of kind {entry['op']!r}")
        target = _function_named(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        made = graph.create_node(entry["op"], target, decode(entry["args"], nodes), decode(entry["kwargs"], nodes),
                                 entry["name"])
        made.meta = {k: decode(v) for k, v in entry["meta"].items()}
        if entry["value"] is not None:
            made.meta["file_value"] = entry["value"]
        nodes[entry["name"]] = made
    return graph


def encode_module(module: nn.Module, path: str = "", seen: dict[int, str] | None = None) -> Json:
    """A layer with everything below it; tensors are referred to by their path, shared modules by the first one's."""
    seen = {} if seen is None else seen
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = path
    kind = type(module)
    hidden = module.names if isinstance(module, Constants) else ("call",)
    extra = {k: encode(v) for k, v in vars(module).items() if path and k not in _INTERNAL and k not in hidden}
    entry = {"class": f"{kind.__module__}:{kind.__qualname__}" if path else "", "training": module.training,
             "parameters": {n: p is not None and p.requires_grad if p is not None else None
                            for n, p in module._parameters.items()},
             "buffers": {n: None if b is None else n not in module._non_persistent_buffers_set
                         for n, b in module._buffers.items()},
             "attributes": extra,
             "children": {n: encode_module(c, f"{path}.{n}" if path else n, seen)
                          for n, c in module._modules.items() if c is not None}}
    if isinstance(module, AutogradFunction):
        entry["call"] = _encode_call(module, path)
    if isinstance(module, Region):
        entry["graphs"] = {mode: encode_graph(graph) for mode, graph in module.graphs.items()}
    return entry


def decode_module(data: Json, tensors: Mapping[str, torch.Tensor], path: str = "",
                  seen: dict[str, nn.Module] | None = None) -> nn.Module:
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
        made._parameters[name] = tensor if tensor is None or isinstance(tensor, nn.Parameter) \
            else nn.Parameter(tensor, requires_grad=grad)
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
        raise RewriteError(f"{path} calls {module.extra_repr()}, code of your own that a file cannot hold: "
                           "graft the program back onto your class and save that")
    return {"function": f"{home}:{call.function.__qualname__}", "spec": pytree.treespec_dumps(call.spec),
            "constants": encode(call.constants), "tensor_places": list(call.tensor_places),
            "output_places": list(call.output_places)}


def _decode_call(data: Json) -> FunctionCall:
    home, _, qualified = data["function"].partition(":")
    if not is_installed(home):
        raise RewriteError(f"the file calls {data['function']}, which is in no installed package")
    found: Any = import_mended(home)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, torch.autograd.Function)):
        raise RewriteError(f"the file names {data['function']} as an autograd function, and it is none")
    return FunctionCall(found, pytree.treespec_loads(data["spec"]), decode(data["constants"]),
                        tuple(data["tensor_places"]), output_places=tuple(data["output_places"]))


def is_installed(module: str) -> bool:
    """Whether a module belongs to an installed package, so that importing it runs nothing from the current folder."""
    top = module.partition(".")[0]
    spec = find_spec(top) if top and top != "__main__" else None
    return spec is not None and spec.origin is not None and "site-packages" in spec.origin


def layer_class(name: str) -> type[nn.Module]:
    """The class ``module:name``, if it is a layer of torch.nn, of this package or of an installed pass package."""
    module, _, qualified = name.partition(":")
    trusted = {"rewrite", *(e.value.partition(":")[0].partition(".")[0]
                            for group in ("rewrite.passes", "rewrite.backends") for e in entry_points(group=group))}
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


def encode_interface(interface: Interface) -> Json:
    """A calling convention; where a default or an output class has no JSON form, a plain one stands in."""
    parameters = [{"name": p.name, "kind": p.kind.name, **_encode_default(p)}
                  for p in interface.signature.parameters.values()]
    arguments = [{"name": a.name, "spec": pytree.treespec_dumps(a.spec), "leaves": list(a.leaves),
                  "constants": encode(a.constants)} for a in interface.arguments]
    return {"parameters": parameters, "arguments": arguments, "input_count": interface.input_count,
            "output_specs": [_encode_spec(s) for s in interface.output_specs],
            "shapes": [list(s) for s in interface.shapes],
            "conditions": [[c.expression, c.words] for c in interface.conditions],
            "dropped_outputs": list(interface.dropped_outputs)}


def _encode_default(parameter: inspect.Parameter) -> Json:
    if parameter.default is inspect.Parameter.empty:
        return {}
    try:
        return {"default": encode(parameter.default)}
    except RewriteError:
        return {"default": None}


def plain_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The same structure in dicts, lists and tuples alone, so that reading it needs no library."""
    return pytree.tree_structure(plain(pytree.tree_unflatten([0] * spec.num_leaves, spec)))


def plain(value: Any) -> Any:
    """A nest of containers with dicts, lists and tuples in place of any other class."""
    if pytree.tree_is_leaf(value):
        return value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    items, _ = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    return [plain(v) for v in items] if isinstance(value, list) else tuple(plain(v) for v in items)


def _encode_spec(spec: pytree.TreeSpec) -> Json:
    try:
        full: str | None = pytree.treespec_dumps(spec)
    except Exception:
        full = None
    homes = sorted({n.type.__module__ for n in _spec_nodes(spec) if n.type is not None})
    return {"plain": pytree.treespec_dumps(plain_spec(spec)), "full": full, "homes": homes}


def _spec_nodes(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return [spec, *(inner for child in spec.children() for inner in _spec_nodes(child))]


def _decode_spec(data: Json, importable: Callable[[str], bool]) -> pytree.TreeSpec:
    if data["full"] is not None:
        try:
            for home in data["homes"]:
                if importable(home):
                    import_mended(home)
            return pytree.treespec_loads(data["full"])
        except (ImportError, RuntimeError, KeyError, ValueError, AttributeError):
            pass  # the library that defines the output class is not here, or broken: plain containers then
    return pytree.treespec_loads(data["plain"])


def decode_interface(data: Json, importable: Callable[[str], bool]) -> Interface:
    """The calling convention that ``encode_interface`` wrote; ``importable`` says which modules may be imported."""
    parameters = [inspect.Parameter(p["name"], inspect._ParameterKind[p["kind"]],
                                    default=decode(p["default"]) if "default" in p else inspect.Parameter.empty)
                  for p in data["parameters"]]
    arguments = tuple(Argument(a["name"], pytree.treespec_loads(a["spec"]), tuple(a["leaves"]), decode(a["constants"]))
                      for a in data["arguments"])
    first, second = (_decode_spec(s, importable) for s in data["output_specs"])
    return Interface(inspect.Signature(parameters), arguments, data["input_count"], (first, second),
                     tuple(tuple(s) for s in data["shapes"]), tuple(Condition(e, w) for e, w in data["conditions"]),
                     tuple(data["dropped_outputs"]))
