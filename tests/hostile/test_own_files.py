"""Hostile files in this package's own format: whatever stands in the program, nothing of it runs, one line says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rewrite
from rewrite import RewriteError
from tests.hostile.archives import PROGRAM, Parts, entries_of, write_signed
from tests.hostile.harness import MARKER, Case, Oracle

Json = Any
CODE = f"__import__('os').system('touch {MARKER}')"
BAITS = ("antigravity", "this", "turtledemo", "idlelib", "lib2to3", "ensurepip")
DEFAULTDICT = json.dumps(
    [
        1,
        {
            "type": "collections.defaultdict",
            "context": json.dumps(
                {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
            ),
            "children_spec": [],
        },
    ]
)


def container(kind: str, context: Json) -> str:
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])


def node(program: Json, op: str, which: int = 0) -> Json:
    return [n for n in program["graph"] if n["op"] == op][which]


def in_node(kind: str, **fields: Json) -> Callable[[Json], object]:
    return lambda p: node(p, kind).update(fields)


def at(*path: str | int, value: Json) -> Callable[[Json], object]:
    """Set the value at a path of the program."""

    def change(program: Json) -> None:
        for key in path[:-1]:
            program = program[key]
        program[path[-1]] = value

    return change


def layer(**fields: Json) -> Callable[[Json], object]:
    return lambda p: p["modules"]["children"]["first"].update(fields)


def attribute(name: str, value: Json) -> Callable[[Json], object]:
    return lambda p: p["modules"]["children"]["first"]["attributes"].update({name: value})


def tensor(**fields: Json) -> Callable[[Json], object]:
    return lambda p: p["tensors"]["first.weight"].update(fields)


def calls(*lines: Json) -> Callable[[Json], object]:
    """Put nodes behind the first input: (target, args) each, called n0, n1, ..."""

    def change(program: Json) -> None:
        made = [
            {
                "name": f"n{i}",
                "op": "call_function",
                "target": target,
                "args": {"tuple": args},
                "kwargs": {"dict": []},
                "meta": {},
                "value": None,
            }
            for i, (target, args) in enumerate(lines)
        ]
        place = max(i for i, n in enumerate(program["graph"]) if n["op"] == "placeholder") + 1
        program["graph"][place:place] = made

    return change


X = {"node": "x"}
NAMES: dict[str, Callable[[Json], object]] = {
    "an input's name": in_node("placeholder", target=f"x={CODE}"),
    "an input's node": in_node("placeholder", name=f"x={CODE}"),
    "a keyword of the language": in_node("placeholder", target="lambda"),
    "a starred name": in_node("placeholder", target=f"*{MARKER}"),
    "a keyword's name": in_node("call_function", kwargs={"dict": [[f"a={CODE},b", 1]]}),
    "a keyword that is no text": in_node("call_function", kwargs={"dict": [[1, 1]]}),
    "a node with a line break": in_node("call_function", name=f"a\n{CODE}\nb"),
    "a parameter's path": in_node("get_attr", target=f'scale")+{CODE}+("'),
    "a layer's path": in_node("call_module", target=f'first")+{CODE}+getattr(self,"norm'),
    "a layer's path in braces": in_node("call_module", target=f"{{{CODE}}}"),
    "a signature's parameter": at("interface", "parameters", 0, "name", value=f"x={CODE}"),
    "a signature's self": at("interface", "parameters", 0, "name", value="self"),
    "a signature's kind": at("interface", "parameters", 0, "kind", value=MARKER),
    "an argument's name": at("interface", "arguments", 0, "name", value=f"x']={CODE}#"),
    "a child's name": lambda p: p["modules"]["children"].update({f"a'{CODE}'": p["modules"]["children"].pop("norm")}),
    "a long name": in_node("placeholder", target="x" * 100_000),
}
CONDITIONS = {
    "code": CODE,
    "a tower of powers": "9**9**9**9",
    "a tower of powers of sizes": "((s0_0**8)**8)**8 > 1",
    "a shift": "1 << 99999999999 > s0_0",
    "a chain of products": "*".join(["s0_0"] * 2000) + " > 1",
    "an attribute": "s0_0.__class__ == 1",
    "a call": "print(s0_0)",
    "a comprehension": "[s for s in (1,)] == 1",
    "a size that is not there": f"{MARKER} > 1",
    "parentheses": "(" * 4000 + "1" + ")" * 4000,
    "minus signs": "-" * 4000 + "1",
    "megabytes": "1 + " * 1_000_000 + "1 > 0",
    "a number of many digits": "9" * 4000 + " > 1",
    "no expression": "1 +",
}
TARGETS = (
    *("aten.from_file.default", "aten.from_file.out", "aten.set_.source_Storage", "aten.resize_.default", "aten.add.out"),
    *("aten._print.default", "profiler._record_function_enter_new.default", "debugprims.load_tensor.default"),
    *("inductor._alloc_from_pool.default", "c10d.send.default", "aten.record_stream.default", "aten.__class__.__init__"),
    *(
        "load_library.x.y",
        "import_module.antigravity.x",
        "_dir.append.default",
        "aten.nonsense.default",
        "higher_order.cond.x",
    ),
    *(
        "operator:attrgetter",
        "operator:call",
        "operator:setitem",
        "math:factorial",
        "math:perm",
        "torch:load",
        "torch:compile",
    ),
    *("rewrite:torch", f"os:{MARKER}", f"{CODE}", "builtins.eval.default", "sparse.qlinear_unpack.default"),
)
SPECS = {
    "an argument's defaultdict": at("interface", "arguments", 0, "spec", value=DEFAULTDICT),
    "an argument's namedtuple": at("interface", "arguments", 0, "spec", value=container("collections.namedtuple", "os")),
    "an argument's deque": at("interface", "arguments", 0, "spec", value=container("collections.deque", None)),
    "an argument's class": at("interface", "arguments", 0, "spec", value=container("antigravity.X", [])),
    "an output's defaultdict": at("interface", "output_specs", 0, "full", value=DEFAULTDICT),
    "a plain output's class": at("interface", "output_specs", 0, "plain", value=container("this.X", [])),
    "a structure of lies": at("interface", "arguments", 0, "spec", value="[1, [[]]]"),
    "a structure in another way": at("interface", "arguments", 0, "spec", value="[2, {}]"),
    "a context with code": at("interface", "arguments", 0, "spec", value=container("builtins.dict", CODE)),
}
LAYERS = {
    "a class of another package": layer(**{"class": "antigravity:X"}),
    "a process": layer(**{"class": "subprocess:Popen"}),
    "a function of torch.nn": layer(**{"class": "torch.nn.modules.linear:init"}),
    "an imported class": layer(**{"class": "torch.nn.modules.container:OrderedDict"}),
    "our program": layer(**{"class": "rewrite.__main__:main"}),
    "our layer graph": layer(**{"class": "rewrite.graph.program:LayerGraph"}),
    "a dunder": layer(**{"class": "torch.nn.modules.linear:Linear.__init__.__globals__"}),
    "a class that is not there": layer(**{"class": f"torch.nn.modules.linear:{MARKER}"}),
    "forward": attribute("forward", {"op": "aten.relu.default"}),
    "children as an attribute": attribute("_modules", {"dict": []}),
    "hooks": attribute("_forward_hooks", {"dict": [[1, {"op": "aten.relu.default"}]]}),
    "a class attribute": attribute("__class__", 1),
    "an attribute with a dot": attribute("a.b", 1),
    "an own function": lambda p: p["modules"]["children"]["first"].update(
        {
            "class": "rewrite.graph.layers:AutogradFunction",
            "call": {
                "function": "subprocess:Popen",
                "spec": container("builtins.tuple", None),
                "constants": {"tuple": []},
                "tensor_places": [],
                "output_places": [],
            },
        }
    ),
    "a region's contexts": layer(
        **{"class": "rewrite.graph.regions:Region", "attributes": {"contexts": 1}, "graphs": {"any": []}}
    ),
    "a region's graph": layer(**{"class": "rewrite.graph.regions:Region", "attributes": {"contexts": {"tuple": []}}}),
    "a circle of modules": lambda p: p["modules"]["children"]["first"]["children"].update({"up": {"same": ""}}),
    "a module that is not there": lambda p: p["modules"]["children"].update({"first": {"same": "nowhere"}}),
    "modules that register operators": at("operators", value=list(BAITS)),
}
TENSORS = {
    "larger than its bytes": tensor(sizes=[2**40, 4]),
    "smaller than its bytes": tensor(sizes=[1, 1]),
    "negative": tensor(sizes=[-4, -4]),
    "of 200 dimensions": tensor(sizes=[1] * 200, order=list(range(200))),
    "of no dtype": tensor(dtype={"dtype": "load"}),
    "of an attribute of torch": tensor(dtype={"dtype": "_dynamo"}),
    "from elsewhere": tensor(entry="../../etc/passwd"),
    "on no device": tensor(device=CODE),
    "in no order": tensor(order=[0, 0]),
    "an input of other sizes": in_node(
        "placeholder", value={"dtype": {"dtype": "float32"}, "sizes": [2] * 60, "device": "cpu"}
    ),
    "a parameter without its tensor": lambda p: p["tensors"].pop("first.weight"),
}
GRAPHS: dict[str, Callable[[Json], object]] = {
    "a value of no kind": in_node("call_function", args={"eval": CODE}),
    "a node that is not there": in_node("call_function", args={"tuple": [{"node": MARKER}]}),
    "two nodes of one name": lambda p: p["graph"].insert(1, dict(p["graph"][0])),
    "no output": lambda p: p["graph"].pop(),
    "no nodes": at("graph", value=[]),
    "no list": at("graph", value=MARKER),
    "a node without fields": at("graph", 0, value={}),
    "a kind of node": in_node("call_function", op="call_method"),
    "an input more": lambda p: (
        p["graph"].insert(0, {**p["graph"][0], "name": "y", "target": "y"})
        if p["graph"][0]["op"] == "placeholder"
        else p["interface"].update(input_count=9)
    ),
    "a layer that is not there": in_node("call_module", target="nowhere"),
    "a tensor that is not there": in_node("get_attr", target="nowhere"),
    "a method": in_node("get_attr", target="forward"),
    "a note on a node": in_node("call_function", meta={MARKER: 1}),
    "no module stack": in_node("call_function", meta={"nn_module_stack": {"dict": [["a", 1]]}}),
    "a layer without its size": lambda p: p["modules"]["children"]["first"]["attributes"].pop("in_features"),
    "code in place of a size": calls(("aten.view.default", [{"node": "x"}, [CODE, 4]])),
    "code as an equation": calls(("aten.einsum.default", [CODE, [{"node": "x"}, {"node": "x"}]])),
    "a billion results": calls(("aten.full.default", [[10**9, 1], 0]), ("aten.unbind.int", [{"node": "n0"}])),
    "a billion steps": calls(("aten.full.default", [[10**9, 1], 0]), ("aten.split.Tensor", [{"node": "n0"}, 1])),
    "a number squared and squared": calls(
        ("aten.sym_size.int", [X, 0]), *(("operator:mul", [{"node": f"n{i}"}, {"node": f"n{i}"}]) for i in range(60))
    ),
    "a number to a power": calls(("aten.sym_size.int", [X, 0]), ("operator:pow", [{"node": "n0"}, 10**9])),
    "a list many times": calls(("aten.split.Tensor", [X, 1]), ("operator:mul", [{"node": "n0"}, 10**9])),
    "a container in a sum": calls(("operator:mul", [[1], 10**9])),
    "a number beyond 64 bits": in_node("call_function", args={"tuple": [X, 10**40]}),
    "a format that is no number": at("format", value=CODE),
    "a later format": at("format", value=3),
    "no history": at("history", value={"a": 1}),
    "a record of nothing": at("history", value=[{}]),
    "no origin": at("origin", value=[]),
    "no tied names": at("tied", value=[[]]),
    "tied names that are not there": at("tied", value=[["a", "b"]]),
    "dimensions of nothing": at("dimensions", value=[{"a": 1}]),
    "as many inputs as it likes": at("interface", "input_count", value=10**12),
    "no interface": at("interface", value={}),
}
CHANGES: dict[str, Callable[[Json], object]] = {
    **{f"name: {k}": v for k, v in NAMES.items()},
    **{f"condition: {k}": at("interface", "conditions", value=[[v, v[:60]]]) for k, v in CONDITIONS.items()},
    **{f"target: {k}"[:60]: in_node("call_function", target=k) for k in TARGETS},
    **{f"structure: {k}": v for k, v in SPECS.items()},
    **{f"layer: {k}": v for k, v in LAYERS.items()},
    **{f"tensor: {k}": v for k, v in TENSORS.items()},
    **{f"graph: {k}": v for k, v in GRAPHS.items()},
}
#: What is left out where it means nothing, and so does no harm.
HARMLESS = ("layer: modules that register operators",)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_program_is_refused_in_one_line(name: str, oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    parts.changed(tmp_path / "model.pt2", CHANGES[name])
    verdict = oracle.judge(Case(("show", "model.pt2"), tmp_path, baits=BAITS))
    assert verdict.faults == ()
    assert verdict.code == (0 if name in HARMLESS else 2)


TEXTS = {
    "nested": "[" * 100_000 + "]" * 100_000,
    "nested tables": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "a number": "1",
    "a number of many digits": '{"format": ' + "9" * 5000 + "}",
    "no JSON": CODE,
    "nothing": "",
    "an empty table": "{}",
    "not finite": '{"format": NaN}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_another_text_for_the_program_is_refused_in_one_line(
    name: str, oracle: Oracle, parts: Parts, tmp_path: Path
) -> None:
    parts.with_text(tmp_path / "model.pt2", TEXTS[name])
    verdict = oracle.judge(Case(("show", "model.pt2"), tmp_path))
    assert (verdict.code, verdict.faults) == (2, ())


def test_the_good_file_is_shown_rewritten_and_exported(oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    write_signed(tmp_path / "model.pt2", parts.own)
    for argv, makes in ((("show", "model.pt2"), ()), (("export", "model.pt2", "-o", "out.pt2"), ("out.pt2",))):
        verdict = oracle.judge(Case(argv, tmp_path, makes=makes))
        assert (verdict.code, verdict.faults) == (0, ())


def test_a_flipped_byte_is_refused_wherever_it_is(parts: Parts, tmp_path: Path) -> None:
    path = write_signed(tmp_path / "model.pt2", parts.own)
    good = path.read_bytes()
    for place in [*range(0, len(good), max(1, len(good) // 300)), *range(len(good) - 120, len(good))]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(RewriteError) as caught:
            rewrite.load(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(good)
    assert rewrite.load(path).history


def test_every_entry_has_its_digest(parts: Parts, tmp_path: Path) -> None:
    path = write_signed(tmp_path / "model.pt2", parts.own)
    digests = json.loads(entries_of(path)["rewrite/digests.json"])
    assert set(digests) == set(entries_of(path)) - {"rewrite/digests.json"}


def test_what_can_be_saved_can_be_read_by_torch_alone(parts: Parts, tmp_path: Path) -> None:
    path = write_signed(tmp_path / "model.pt2", parts.own)
    plain = torch.export.load(path)
    assert torch.equal(plain.module()(torch.ones(5, 4))["out"], rewrite.load(path).module.eval()(torch.ones(5, 4))["out"])
    assert PROGRAM in parts.own
