"""Hostile archives of torch.export: libraries, pickles, expressions and names that do more than an export needs."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rewrite
from tests.hostile.archives import EXPORT, Parts, Small, write_plain
from tests.hostile.harness import MARKER, Case, Oracle
from tests.hostile.test_own_files import BAITS, CODE, DEFAULTDICT, at, container

Json = Any
Change = Callable[[Json], object]
GRAPH = ("graph_module", "graph")


def node(**fields: Json) -> Change:
    return lambda d: d["graph_module"]["graph"]["nodes"][0].update(fields)


def expression(text: str) -> Change:
    """Another text for every dynamic size."""

    def change(value: Json) -> None:
        if isinstance(value, dict) and "expr_str" in value:
            value["expr_str"] = text
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            change(inner)

    return change


def input_name(text: str) -> Change:
    """Another name for the model's input, wherever it stands."""

    def renamed(value: Json) -> Json:
        if isinstance(value, dict):
            return {text if k == "x" else k: renamed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v) for v in value]
        return text if value == "x" else value

    return lambda d: d.update(renamed(dict(d)))


def signature(**fields: Json) -> Change:
    return lambda d: d["graph_module"]["module_call_graph"][0]["signature"].update(fields)


EXPRESSIONS = {
    "code": CODE,
    "an import": "__import__('antigravity')",
    "code in a symbol": f"Symbol('s1').__class__.__init__.__globals__['{MARKER}']",
    "a symbol's name": f"Symbol('{MARKER}', positive=True)",
    "a symbol's flag": f"Symbol('s1', {MARKER}=True)",
    "a tower of powers": "9**9**9**9",
    "a tower of calls": "Pow(Integer(9), Pow(Integer(9), Pow(Integer(9), Integer(9))))",
    "a large power": "Pow(Symbol('s1', integer=True), Integer(99999999))",
    "a power of powers": "Pow(Pow(Pow(Symbol('s1'), Integer(8)), Integer(8)), Integer(8))",
    "a factorial": "factorial(Integer(99999999))",
    "a function of sympy": "Lambda(Symbol('s1'), Symbol('s1'))",
    "an evaluation": f"sympify('{MARKER}')",
    "many digits": "Integer(" + "9" * 10_000 + ")",
    "parentheses": "(" * 10_000 + "1" + ")" * 10_000,
    "no expression": "Symbol(",
    "a list": "[1, 2]",
    "a lambda": f"(lambda: {MARKER})()",
    "a text with an escape": "Symbol('s\\x31')",
}
GRAPHS: dict[str, Change] = {
    "an operator on files": node(target="torch.ops.aten.from_file.default"),
    "an operator of libraries": node(target="torch.ops.load_library"),
    "a function of torch": node(target="torch.load"),
    "a nested function of torch": node(target="torch.hub.load"),
    "a function of operator": node(target="_operator.attrgetter"),
    "a function of math": node(target="math.factorial"),
    "an extension": node(target=f"#{MARKER}:x"),
    "code as a target": node(target=CODE),
    "a higher operator": node(target="torch.ops.higher_order.while_loop"),
    "an input's name": input_name(f"x={CODE}"),
    "a node's name": node(name=f"a\n{CODE}"),
    "a keyword's name": lambda d: d["graph_module"]["graph"]["nodes"][0]["inputs"][0].update(
        {"name": f"a={CODE},b", "kind": 2}
    ),
    "a parameter's path": lambda d: d["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
        {"parameter_name": f'a")+{CODE}+("'}
    ),
    "a custom object": at(*GRAPH, "custom_obj_values", value={"x": {"name": "x", "class_fqn": CODE}}),
    "a structure's factory": signature(in_spec=DEFAULTDICT),
    "a structure's class": signature(out_spec=container("antigravity.X", ["a"])),
    "an argument's name": signature(forward_arg_names=[f"x={CODE}"]),
    "unbacked sizes without end": at("range_constraints", value={"u99999999999": {"min_val": 0, "max_val": 1}}),
    "a range that is code": at("range_constraints", value={CODE: {"min_val": 0, "max_val": 1}}),
    "a dialect": at("verifiers", value=[CODE]),
    "a device": lambda d: next(iter(d["graph_module"]["graph"]["tensor_values"].values())).update(
        {"device": {"type": CODE, "index": None}}
    ),
    "an unknown text": at("surprise", value=CODE),
    "no graph": at("graph_module", value=None),
    "no nodes": at(*GRAPH, "nodes", value={}),
    "a version of another world": at("schema_version", value={"major": 99, "minor": 0}),
    "a number beyond 64 bits": at("schema_version", value={"major": 10**40, "minor": 0}),
    "an argument that is not there": node(inputs=[{"name": "input", "arg": {"as_tensor": {"name": MARKER}}, "kind": 1}]),
}
#: What is dropped before torch sees it, or read by a grammar that leaves it out.
HARMLESS: dict[str, Change] = {
    "the sources of a node": node(metadata={"source_fn_stack": "a,torch.hub.load", "custom": CODE, "from_node": "[]"}),
    "a condition": at("guards_code", value=[f"L['x'].size()[0] > {CODE}", "L['x'].size()[0] > 9**9**9**9"]),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_size_that_is_more_than_one_is_refused(name: str, oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    parts.changed_export(tmp_path / "model.pt2", expression(EXPRESSIONS[name]))
    judged(oracle, tmp_path, 2)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_names_more_is_refused(name: str, oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    parts.changed_export(tmp_path / "model.pt2", GRAPHS[name])
    judged(oracle, tmp_path, 2)


@pytest.mark.parametrize("name", HARMLESS)
def test_notes_go_no_further(name: str, oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    parts.changed_export(tmp_path / "model.pt2", HARMLESS[name])
    judged(oracle, tmp_path, 0)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def payload(**fields: Json) -> Callable[[dict[str, bytes]], object]:
    """Another line of the table of weights."""

    def change(entries: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        table = json.loads(entries[name])
        line = table["config"]["first.weight"]
        line.update({k: v for k, v in fields.items() if k in line})
        line["tensor_meta"].update({k: v for k, v in fields.items() if k in line["tensor_meta"]})
        entries[name] = json.dumps(table).encode()

    return change


def numbers(*values: int) -> list[Json]:
    return [{"as_int": value} for value in values]


ENTRIES: dict[str, Callable[[dict[str, bytes]], object]] = {
    "a compiled library": lambda e: e.update({"data/aotinductor/model/evil.so": b"\x7fELF" + bytes(100)}),
    "a custom object's pickle": lambda e: e.update({"data/surprise/custom_obj_0": pickled(Evil())}),
    "weights as a pickle": payload(use_pickle=True),
    "weights of the old format": lambda e: (
        e.pop("data/weights/model_weights_config.json"),
        e.update({"data/weights/model.pt": pickled({"a": Evil()})}),
    ),
    "inputs as a pickle": lambda e: e.update({"data/sample_inputs/model.pt": pickled(((Evil(),), {}))}),
    "inputs that are no pair": lambda e: e.update({"data/sample_inputs/model.pt": pickled([1])}),
    "inputs that are none": lambda e: e.update({"data/sample_inputs/model.pt": b""}),
    "inputs that are noise": lambda e: e.update({"data/sample_inputs/model.pt": b"PK\x03\x04" + bytes(100)}),
    "inputs that hold themselves": lambda e: e.update({"data/sample_inputs/model.pt": pickled(circle())}),
    "inputs of another shape": lambda e: e.update({"data/sample_inputs/model.pt": pickled(((), {"y": 1}))}),
    "weights from elsewhere": payload(path_name="../../etc/passwd"),
    "weights that are not there": payload(path_name="weight_99"),
    "larger than its bytes": payload(sizes=numbers(2**40, 4)),
    "strides beyond its bytes": payload(strides=numbers(2**40, 1)),
    "an offset beyond its bytes": payload(storage_offset={"as_int": 2**40}),
    "a negative size": payload(sizes=numbers(-1, -1)),
    "200 dimensions": payload(sizes=numbers(*[1] * 200), strides=numbers(*[1] * 200)),
    "a dtype that is none": payload(dtype=99),
    "a size that is code": payload(sizes=[{"as_expr": {"expr_str": CODE}}] * 2),
    "an entry above": lambda e: e.update({"../../up": b"x"}),
    "an entry at the root": lambda e: e.update({"//etc/up": b"x"}),
    "an entry with a backslash": lambda e: e.update({"extra/..\\up": b"x"}),
    "two models": lambda e: e.update({"models/other.json": e[EXPORT]}),
    "no model": lambda e: e.pop(EXPORT),
    "no format": lambda e: e.update({"archive_format": b"zip"}),
    "a file of format 1": lambda e: e.update({"extra/rewrite.json": b"{}"}),
    "digests of nothing": lambda e: e.update({"rewrite/digests.json": b"{}"}),
    "a graph that is no JSON": lambda e: e.update({EXPORT: CODE.encode()}),
    "a graph nested without end": lambda e: e.update({EXPORT: b"[" * 100_000 + b"]" * 100_000}),
}


def circle() -> list[Any]:
    held: list[Any] = []
    held.append(held)
    return held


@pytest.mark.parametrize("name", ENTRIES)
def test_an_archive_that_holds_more_is_refused(name: str, oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    entries = dict(parts.export)
    ENTRIES[name](entries)
    write_plain(tmp_path / "model.pt2", entries)
    judged(oracle, tmp_path, 2)


def test_a_compressed_archive_is_refused_before_it_grows(oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    bomb = {**parts.export, "extra/bomb": bytes(1 << 28)}
    write_plain(tmp_path / "model.pt2", bomb, zipfile.ZIP_DEFLATED)
    judged(oracle, tmp_path, 2)


def test_two_entries_of_one_name_are_refused(oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    write_plain(tmp_path / "model.pt2", parts.export)
    with zipfile.ZipFile(tmp_path / "model.pt2", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"model/{EXPORT}", CODE)
    judged(oracle, tmp_path, 2)


def test_every_truncation_is_one_line(parts: Parts, tmp_path: Path) -> None:
    path = write_plain(tmp_path / "model.pt2", parts.export)
    good = path.read_bytes()
    for size in range(0, len(good) - 1, len(good) // 60):
        path.write_bytes(good[:size])
        with pytest.raises(rewrite.RewriteError) as caught:
            rewrite.load(path)
        assert "\n" not in str(caught.value)


def test_the_good_export_is_shown_rewritten_and_exported(oracle: Oracle, parts: Parts, tmp_path: Path) -> None:
    write_plain(tmp_path / "model.pt2", parts.export)
    judged(oracle, tmp_path, 0)
    for argv in (("apply", "model.pt2", "-p", "dyt", "-o", "out.pt2"), ("export", "model.pt2", "-o", "out.pt2")):
        verdict = oracle.judge(Case(argv, tmp_path, makes=("out.pt2",)))
        assert (verdict.code, verdict.faults) == (0, ())


def ordinary() -> dict[str, torch.nn.Module]:
    nn = torch.nn
    return {
        "linear": nn.Linear(4, 4),
        "linear and relu": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        "a block": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)),
        "two of a kind": nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
        "nested": nn.Sequential(nn.Sequential(nn.Sequential(nn.Tanh()), nn.Dropout(0.5)), nn.BatchNorm1d(4)),
        "small": Small(),
    }


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ordinary())
def test_ordinary_exports_are_read(name: str, dynamic: bool, tmp_path: Path) -> None:
    model = ordinary()[name].eval()
    sizes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    exported = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=sizes)
    torch.export.save(exported, tmp_path / "x.pt2")
    program = rewrite.load(tmp_path / "x.pt2")
    inputs = torch.randn(5 if dynamic else 3, 4)
    torch.testing.assert_close(program.module.eval()(inputs), model(inputs), rtol=0, atol=0)


def judged(oracle: Oracle, folder: Path, code: int) -> None:
    verdict = oracle.judge(Case(("show", "model.pt2"), folder, baits=BAITS))
    assert verdict.faults == ()
    assert verdict.code == code
