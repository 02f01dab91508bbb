"""Pickled modules: real ones come back as they were, hostile ones are refused before anything of theirs runs."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewrite.errors import RewriteError
from rewrite.graph.hooks import Enter, hung
from rewrite.sources.pickles import load_module
from tests.models.zoo import timm_model

# ---- pickles by hand -------------------------------------------------------------------------------------

MARK, REDUCE, NEWOBJ, BUILD, EMPTY_DICT, EMPTY_TUPLE, NONE = b"(", b"R", b"\x81", b"b", b"}", b")", b"N"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tup(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tup(*arguments) + REDUCE


def dictionary(entries: dict[str, bytes]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def mapping(*values: bytes) -> bytes:
    """An OrderedDict of the values under the keys "0", "1", ..."""
    ordered = call(name("collections", "OrderedDict"))
    return ordered + MARK + b"".join(text(str(i)) + value for i, value in enumerate(values)) + b"u"


def rebuilt(cls: bytes, state: dict[str, bytes]) -> bytes:
    return cls + EMPTY_TUPLE + NEWOBJ + dictionary(state) + BUILD


LINEAR = name("torch.nn.modules.linear", "Linear")
RELU = name("torch.nn.functional", "relu")
PARTIAL = name("functools", "partial")
TENSOR_V2 = name("torch._utils", "_rebuild_tensor_v2")
EMPTY_STATE = {"training": b"\x88", "_parameters": EMPTY_DICT, "_buffers": EMPTY_DICT, "_modules": EMPTY_DICT}


def module(**state: bytes) -> bytes:
    return rebuilt(LINEAR, EMPTY_STATE | state)


def with_attribute(value: bytes) -> bytes:
    return module(act=value)


def tensor(hooks: bytes) -> bytes:
    storage = tup(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x00") + b"Q"
    return call(TENSOR_V2, storage, b"K\x00", tup(), tup(), b"\x89", hooks)


def write(path: Path, body: bytes, *, protocol: bytes = b"\x80\x02") -> Path:
    """A file as torch.save writes it, with this pickle in it."""
    writer = torch._C.PyTorchFileWriter(str(path))
    data = protocol + body + b"."
    writer.write_record("data.pkl", data, len(data))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return path


def system(sentinel: Path) -> bytes:
    return call(name("os", "system"), text(f"touch {sentinel}"))


# ---- what comes back -------------------------------------------------------------------------------------


def test_hand_written_module_loads(tmp_path: Path) -> None:
    assert type(load_module(write(tmp_path / "m.pt", module()))) is nn.Linear


def test_attributes_of_all_allowed_kinds_come_back(tmp_path: Path) -> None:
    from transformers.utils.generic import PaddingStrategy

    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.BatchNorm1d(4)).eval()
    holder: Any = model
    holder.functions = [
        functional.relu,
        functional.gelu,
        torch.tanh,
        torch.special.expit,
        partial(functional.gelu, approximate="tanh"),
    ]
    holder.data = (frozenset({1}), {2}, b"bytes", 1j, torch.float16, torch.Size([1]), torch.device("cpu"), slice(1))
    holder.side, holder.layer = PaddingStrategy.LONGEST, nn.LayerNorm
    cast: Any = model[0].weight
    cast._mark = {"a": 1}
    torch.save(model, tmp_path / "m.pt")

    loaded: Any = load_module(tmp_path / "m.pt")

    assert loaded.data == holder.data
    assert loaded.functions[:4] == holder.functions[:4]
    assert loaded.functions[4].keywords == {"approximate": "tanh"}
    assert (loaded.side, loaded.layer) == (PaddingStrategy.LONGEST, nn.LayerNorm)
    assert loaded[0].weight._mark == {"a": 1}
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    torch.save(model, tmp_path / "m.pt")
    loaded: Any = load_module(tmp_path / "m.pt")
    assert loaded[1].weight is loaded[0].weight


def test_transformers_model_comes_back_with_its_config(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16)).eval()
    torch.save(model, tmp_path / "m.pt")
    loaded: Any = load_module(tmp_path / "m.pt")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_dict() == model.config.to_dict()


def test_class_that_was_not_imported_yet_is_found(tmp_path: Path) -> None:
    importlib.import_module("transformers")
    home = "transformers.models.rembert.modeling_rembert"
    assert home not in sys.modules
    loaded = load_module(write(tmp_path / "m.pt", rebuilt(name(home, "RemBertPooler"), EMPTY_STATE)))
    assert type(loaded).__module__ == home


def test_timm_model_comes_back(tmp_path: Path) -> None:
    model = timm_model("test_vit").eval()
    torch.save(model, tmp_path / "m.pt")
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_module(tmp_path / "m.pt")(x), model(x))


# ---- what is refused -------------------------------------------------------------------------------------

PLAIN_CALLS = {
    "os.system": ("os", "system"),
    "posix.system": ("posix", "system"),
    "eval": ("builtins", "eval"),
    "exec of Python 2": ("__builtin__", "exec"),
    "import": ("builtins", "__import__"),
    "subprocess": ("subprocess", "check_output"),
    "torch.load": ("torch", "load"),
    "torch.hub": ("torch.hub", "load"),
    "C++ extension": ("torch.utils.cpp_extension", "load_inline"),
    "installed function": ("transformers.utils.hub", "cached_file"),
    "dotted through a module": ("torch.nn.functional", "os.system"),
    "dotted module": ("torch", "nn.functional.torch.hub.load"),
    "dotted through an allowed class": ("torch.nn.modules.linear", "Linear.__init__"),
    "reexported function": ("torch.nn.functional", "handle_torch_function"),
    "private function": ("torch.nn.functional", "_no_grad_embedding_renorm_"),
    "allowed function": ("torch.nn.functional", "relu"),
    "constructor of a module": ("torch.nn.modules.linear", "Linear"),
    "constructor of a config": ("transformers.models.bert.configuration_bert", "BertConfig"),
    "reconstructor": ("copy_reg", "_reconstructor"),
    "numpy": ("numpy", "load"),
    "operator": ("operator", "attrgetter"),
    "path": ("pathlib", "PosixPath"),
}


@pytest.mark.parametrize("target", PLAIN_CALLS.values(), ids=PLAIN_CALLS.keys())
@pytest.mark.parametrize("place", [bytes, with_attribute], ids=["root", "attribute"])
def test_calls_are_refused(tmp_path: Path, target: tuple[str, str], place: Callable[[bytes], bytes]) -> None:
    sentinel = tmp_path / "ran"
    body = place(call(name(*target), text(f"touch {sentinel}")))
    refuse(write(tmp_path / "m.pt", body), sentinel)


@pytest.mark.parametrize("target", PLAIN_CALLS.values(), ids=PLAIN_CALLS.keys())
def test_stored_callables_are_refused(tmp_path: Path, target: tuple[str, str]) -> None:
    if target == ("torch.nn.functional", "relu") or target[1] == "Linear":
        return  # the two that a model may hold
    path = write(tmp_path / "m.pt", with_attribute(name(*target)))
    refuse(path)
    refuse(write(tmp_path / "p.pt", with_attribute(call(PARTIAL, name(*target)))))


OBJECTS = {
    "a process": ("subprocess", "Popen"),
    "a folder that deletes itself": ("tempfile", "TemporaryDirectory"),
    "a metaclass": ("builtins", "type"),
    "a graph module": ("torch.fx.graph_module", "GraphModule"),
    "a script module": ("torch.jit._script", "RecursiveScriptModule"),
    "a compiled module": ("torch._dynamo.eval_frame", "OptimizedModule"),
    "a remote module": ("torch.distributed.nn.api.remote_module", "RemoteModule"),
    "a wrapped hook": ("torch.nn.modules.module", "_WrappedHook"),
    "an imported class": ("torch.nn.modules.linear", "Module"),
    "a data class without its package's module": ("transformers.models.bert.configuration_bert", "BertConfig"),
    "a class that is not there": ("transformers.models.bert.modeling_bert", "Missing"),
}


@pytest.mark.parametrize("target", OBJECTS.values(), ids=OBJECTS.keys())
def test_objects_are_refused(tmp_path: Path, target: tuple[str, str]) -> None:
    body = with_attribute(rebuilt(name(*target), {"args": text("x")}))
    refuse(write(tmp_path / "m.pt", body))


TYPED = name("torch._tensor", "_rebuild_from_type_v2")
WITH_STATE = name("torch._utils", "_rebuild_parameter_with_state")
FUNCTIONS = name("torch._C", "_VariableFunctionsClass")
GETATTR = name("__builtin__", "getattr")
NO_HOOKS = mapping()
TRICKS = {
    "forward replaced": module(forward=RELU),
    "call replaced": module(__call__=RELU),
    "class replaced": module(__class__=LINEAR),
    "compiled call": module(_compiled_call_impl=RELU),
    "forward hook": module(_forward_hooks=mapping(RELU)),
    "forward hook in a plain dict": module(_forward_hooks=dictionary({"0": RELU})),
    "load hook": module(_load_state_dict_pre_hooks=mapping(RELU)),
    "hook set after BUILD": with_attribute(
        tup(module(_forward_hooks=mapping() + b"q\x07"), b"h\x07" + text("0") + RELU + b"s")
    ),
    "hook replaced after BUILD": with_attribute(
        tup(
            LINEAR + EMPTY_TUPLE + NEWOBJ + dictionary({"_forward_hooks": mapping(RELU)}) + b"q\x07" + BUILD,
            b"h\x07" + text("_forward_hooks") + mapping() + b"s",
        )
    ),
    "hook in the arguments of OrderedDict": module(
        _forward_hooks=call(name("collections", "OrderedDict"), b"](" + tup(text("0"), RELU) + b"e")
    ),
    "method of OrderedDict replaced": module(_forward_hooks=NO_HOOKS + dictionary({"values": RELU}) + BUILD),
    "child that is no module": module(_modules=dictionary({"0": call(PARTIAL, RELU)})),
    "children that are no dict": module(_modules=RELU),
    "state that is no dict": LINEAR + EMPTY_TUPLE + NEWOBJ + tup(NONE, dictionary({"forward": RELU})) + BUILD,
    "gradient hook": with_attribute(tensor(mapping(RELU))),
    "constructor through a typed tensor": with_attribute(call(TYPED, LINEAR, name("torch", "Tensor"), tup(), NONE)),
    "typed tensor of another class": with_attribute(call(TYPED, TENSOR_V2, LINEAR, tup(), EMPTY_DICT)),
    "tensor's data replaced": with_attribute(
        call(WITH_STATE, tensor(NO_HOOKS), b"\x88", NO_HOOKS, dictionary({"data": NONE}))
    ),
    "tensor's slots": with_attribute(
        call(WITH_STATE, tensor(NO_HOOKS), b"\x88", NO_HOOKS, tup(NONE, dictionary({"data": NONE})))
    ),
    "a torch function that writes": with_attribute(call(GETATTR, FUNCTIONS, text("from_file"))),
    "an attribute of a module": with_attribute(call(GETATTR, module(), text("forward"))),
    "a dunder of torch's functions": with_attribute(call(GETATTR, FUNCTIONS, text("__class__"))),
    "computed callee": with_attribute(call(call(GETATTR, FUNCTIONS, text("relu")), NONE)),
    "computed callee from the memo": with_attribute(tup(call(PARTIAL, RELU) + b"q\x01", call(b"h\x01"))),
    "partial made something else": with_attribute(
        call(PARTIAL, RELU) + tup(name("os", "system"), tup(text("x")), EMPTY_DICT, NONE) + BUILD
    ),
    "arguments to __new__": LINEAR + tup(b"K\x01") + NEWOBJ,
    "codec": with_attribute(call(name("_codecs", "encode"), text("x"), text("evil"))),
    "outside reference": with_attribute(tup(text("module"), text("x")) + b"Q"),
    "enum made from nothing": with_attribute(call(name("transformers.utils.generic", "ExplicitEnum"), text("x"), text("y"))),
    "state on a tensor": with_attribute(tensor(NO_HOOKS) + tup(NONE) + BUILD),
    "stored escaped name": with_attribute(b"co\\x73\nsystem\n"),
    "escaped name": with_attribute(call(b"co\\x73\nsystem\n", text("x"))),
    "name with a space": with_attribute(b"cos system\nx\n"),
}


@pytest.mark.parametrize("body", TRICKS.values(), ids=TRICKS.keys())
def test_tricks_are_refused(tmp_path: Path, body: bytes) -> None:
    refuse(write(tmp_path / "m.pt", body))


OPCODES = {
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + tup(text("true")) + REDUCE,
    "INST": MARK + text("true") + b"ios\nsystem\n",
    "OBJ": MARK + name("os", "system") + text("true") + b"o",
    "EXT1": b"\x82\x01",
    "NEWOBJ_EX": LINEAR + EMPTY_TUPLE + EMPTY_DICT + b"\x92",
    "PERSID": b"Pos.system\n",
    "DUP": module() + b"2",
}


@pytest.mark.parametrize("body", OPCODES.values(), ids=OPCODES.keys())
def test_opcodes_that_torch_does_not_write_are_refused(tmp_path: Path, body: bytes) -> None:
    refuse(write(tmp_path / "m.pt", with_attribute(body)))


def test_pickle_of_another_protocol_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "m.pt", pickle_protocol=4)
    refuse(tmp_path / "m.pt", match="pickle_protocol=4")


def test_reduce_of_a_class_is_refused(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {sentinel}",)

    model: Any = nn.Linear(1, 1)
    model.evil = Evil()
    torch.save(model, tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", sentinel, match=r"names posix\.system")


def test_second_record_of_the_same_name_changes_nothing(tmp_path: Path) -> None:
    path, sentinel = write(tmp_path / "m.pt", module()), tmp_path / "ran"
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("m/data.pkl", b"\x80\x02" + with_attribute(system(sentinel)) + b".")
    try:
        load_module(path)
    except RewriteError as error:
        assert "system" in str(error) or "damaged" in str(error)
    assert not sentinel.exists()


def test_every_truncation_and_many_corruptions_are_one_line(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    start = good.index(b"data.pkl")
    path = tmp_path / "m.pt"
    for size in range(0, len(good) - 1, 97):
        path.write_bytes(good[:size])
        refuse(path)
    for place in range(start, start + 300, 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
        try:
            load_module(path)
        except RewriteError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("shadow", ["evilnet", "transformers/models/evil"])
def test_code_beside_the_file_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shadow: str) -> None:
    source, sentinel = tmp_path / f"{shadow}.py", tmp_path / "ran"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(f"import torch\nopen({str(sentinel)!r}, 'w')\nclass Net(torch.nn.Module): pass\n")
    (tmp_path / "evilnet.egg-info").mkdir()
    (tmp_path / "evilnet.egg-info/top_level.txt").write_text("evilnet\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path / "m.pt", rebuilt(name(shadow.replace("/", "."), "Net"), EMPTY_STATE))
    refuse(path, sentinel, match="no class of an installed package")
    assert shadow not in sys.modules


def test_nothing_is_imported_for_a_pickle_with_a_suspect_name(tmp_path: Path) -> None:
    innocent = "transformers.models.convbert.modeling_convbert"
    body = rebuilt(name(innocent, "ConvBertModel"), {**EMPTY_STATE, "x": system(tmp_path / "ran")})
    assert innocent not in sys.modules
    refuse(write(tmp_path / "m.pt", body), tmp_path / "ran")
    assert innocent not in sys.modules


def test_class_of_an_editable_install_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, packages = tmp_path / "source", tmp_path / "packages"
    (packages / "ours-1.dist-info").mkdir(parents=True)
    (packages / "ours-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1\n")
    (packages / "ours-1.dist-info/direct_url.json").write_text(
        f'{{"url": "{source.as_uri()}", "dir_info": {{"editable": true}}}}'
    )
    source.mkdir()
    (source / "ours_net.py").write_text("import torch\nclass Net(torch.nn.Module): pass\n")
    monkeypatch.syspath_prepend(str(source))
    path = write(tmp_path / "m.pt", rebuilt(name("ours_net", "Net"), EMPTY_STATE))
    refuse(path, match="no class of an installed package")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(packages)])
    assert type(load_module(path)).__name__ == "Net"


# ---- mistakes --------------------------------------------------------------------------------------------


def save_script(path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(str(path))


def save_program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(1, 1), (torch.randn(2, 1),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "missing": (lambda p: None, "there is no file"),
    "text": (lambda p: p.write_text("hello"), "not a file saved by torch.save"),
    "png": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), "not a file saved by torch.save"),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps(1)), "not a file saved by torch.save"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "a"), "not written by torch.save"),
    "old": (lambda p: torch.save(nn.Linear(1, 1), p, _use_new_zipfile_serialization=False), "format before 1.6"),
    "state_dict": (lambda p: torch.save(nn.Linear(1, 1).state_dict(), p), "weight, bias, .* --weights"),
    "checkpoint": (lambda p: torch.save({"model": nn.Linear(1, 1), "epoch": 1}, p), "keys model, epoch"),
    "tensor": (lambda p: torch.save(torch.zeros(1), p), "holds a tensor"),
    "parameter": (lambda p: torch.save(nn.Parameter(torch.zeros(1)), p), "holds a tensor"),
    "list": (lambda p: torch.save([nn.Linear(1, 1)], p), "holds a list"),
    "number": (lambda p: torch.save(1, p), "holds a int"),
    "script": (save_script, "TorchScript"),
    "program": (save_program, r"rename it to model\.pt2"),
    "graph module": (lambda p: torch.save(torch.fx.symbolic_trace(nn.Linear(1, 1)), p), "holds a GraphModule"),
    "script class": (lambda p: write(p, name("__main__", "Net") + EMPTY_TUPLE + NEWOBJ), r"__main__\.Net"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_told_in_one_line(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "model.pt"
    make(path)
    refuse(path, match=message)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refuse(tmp_path / "m.pt", match="Permission denied")


# ---- trust -----------------------------------------------------------------------------------------------


def test_trust_reads_a_class_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net_of_test.py").write_text("import torch\nclass Net(torch.nn.Module): pass\n")
    path = write(tmp_path / "m.pt", rebuilt(name("own_net_of_test", "Net"), EMPTY_STATE))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert type(load_module(path, trust=True)).__name__ == "Net"
    assert sys.path == before


def test_trust_runs_what_the_file_holds(tmp_path: Path) -> None:
    load_module(write(tmp_path / "m.pt", with_attribute(system(tmp_path / "ran"))), trust=True)
    assert (tmp_path / "ran").exists()


def test_trust_reads_the_old_format(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert type(load_module(tmp_path / "m.pt", trust=True)) is nn.Linear


def test_trust_advises_on_a_class_of_a_script(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", name("__main__", "NoSuchNet") + EMPTY_TUPLE + NEWOBJ)
    with pytest.raises(RewriteError, match=r"__main__\.NoSuchNet.*package\.module:factory"):
        load_module(path, trust=True)


def test_trust_still_wants_a_module(tmp_path: Path) -> None:
    torch.save({"a": Tensor()}, tmp_path / "m.pt")
    with pytest.raises(RewriteError, match="holds a dict"):
        load_module(tmp_path / "m.pt", trust=True)


def refuse(path: Path, sentinel: Path | None = None, *, match: str | None = None) -> None:
    """Loading fails with one line, without a warning, and nothing has run."""
    with pytest.raises(RewriteError, match=match) as caught:
        load_module(path)
    assert "\n" not in str(caught.value)
    assert sentinel is None or not sentinel.exists()


@pytest.mark.parametrize("hook", ["ours", "print"])
def test_no_hook_is_loaded_but_those_of_this_package(hook: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    hooks: Any = model._forward_pre_hooks
    hooks["rewrite masks"] = Enter("masks", {"share": 0.5}) if hook == "ours" else print
    torch.save(model, tmp_path / "net.pt")
    if hook == "ours":
        assert hung(load_module(tmp_path / "net.pt")) == {"masks": {"share": 0.5}}
    else:
        with pytest.raises(RewriteError, match=r"builtins\.print"):
            load_module(tmp_path / "net.pt")
