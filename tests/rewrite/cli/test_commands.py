"""The command line as its users meet it: what it prints, what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner, Result

import rewrite
from rewrite import plugins
from rewrite.cli.commands import app
from rewrite.errors import RewriteError
from rewrite.files.writers import plan
from rewrite.pipeline import registry
from rewrite.pipeline.pass_ import Pass, describe
from rewrite.proof.contract import SAME, Contract

ROOT = Path(__file__).parents[3]
MLP_INPUTS = ("--inputs", "2x8")
ESCAPE = "\x1b"


def run(*arguments: str | Path, code: int = 0) -> Result:
    """The command line in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def fails(*arguments: str | Path) -> str:
    """The error of a command that a user can mend: exit 2, nothing on stdout."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip("\n")


def fresh(code: str, folder: Path) -> str:
    """What a new process, which knows nothing of this one, prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4), nn.LayerNorm(4))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`model.pt`, a small module of torch's own layers, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    torch.save(mlp(), "model.pt")
    return Path("model.pt")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def changed_files(folder: Path, before: dict[str, bytes]) -> set[str]:
    after = contents(folder)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


# ---- passes for the tests alone --------------------------------------------------------------------------


@dataclass(frozen=True)
class Liar(Pass):
    """Promise that nothing changes, and double a weight."""

    name = "liar"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Any, context: Any) -> None:
        path, weight = next(iter(program.module.named_parameters()))
        context.edit.set_parameter(path, 2 * weight)


@dataclass(frozen=True)
class Picky(Pass):
    """Find every layer too plain to change."""

    name = "picky"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Any, context: Any) -> None:
        for node, layer in program.layers():
            context.skip(str(node.target), f"a {type(layer).__name__} is too plain")
        context.warn("nothing here is worth it")


@dataclass(frozen=True)
class Broken(Pass):
    """Fail in a way that nobody foresaw."""

    name = "broken"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Any, context: Any) -> None:
        raise ZeroDivisionError("not foreseen")


@dataclass(frozen=True)
class Interrupted(Broken):
    """Stand for a user who presses Ctrl-C."""

    name = "interrupted"

    def run(self, program: Any, context: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry knows the passes above beside the installed ones."""
    made = [
        EntryPoint(each.name, f"{each.__module__}:{each.__name__}", registry.PASSES)
        for each in (Liar, Picky, Broken, Interrupted)
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*entry_points(group=group), *made])


# ---- apply: results --------------------------------------------------------------------------------------


def test_apply_gives_the_class_back(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = run("apply", model, "--pass", "dyt{alpha=0.8}", *MLP_INPUTS)
    assert changed_files(tmp_path, before) == {"model.dyt.pt"}
    last = result.stdout.splitlines()[-1]
    assert last.startswith("wrote model.dyt.pt: Sequential")
    code = (
        "import torch; torch.manual_seed(1); m = torch.load('model.dyt.pt', weights_only=False); "
        "print(type(m).__name__, type(m[1]).__name__, m.training, tuple(m(torch.randn(3, 8)).shape))"
    )
    assert fresh(code, tmp_path) == "Sequential DynamicTanh True (3, 4)"


def test_a_result_can_be_read_again_safely_and_rewritten_again(model: Path) -> None:
    run("apply", model, "-p", "dyt{where=1}", *MLP_INPUTS)
    result = run("apply", "model.dyt.pt", "-p", "dyt", *MLP_INPUTS)
    assert Path("model.dyt.dyt.pt").is_file()
    assert "1 replace layer: LayerNorm -> DynamicTanh" in result.stdout


def test_several_passes_are_named_in_the_result(model: Path) -> None:
    run("apply", model, "--pipeline", "dyt{where=1},dyt{where=4}", *MLP_INPUTS)
    rewritten = torch.load("model.dyt.dyt.pt", weights_only=False)
    assert [type(layer).__name__ for layer in rewritten][1::3] == ["DynamicTanh", "DynamicTanh"]


def test_apply_prints_what_happened(model: Path) -> None:
    text = run("apply", model, "-p", "dyt{where=1}", *MLP_INPUTS, "--dry-run").stdout
    assert ESCAPE not in text
    assert max(map(len, text.splitlines()[:-1])) <= 80  # the last names the file, unbroken
    rows = {line.split()[0]: line for line in text.splitlines() if len(line.split()) > 1}
    assert "Sequential, 252 parameters, captured in" in text
    assert "dyt{where=1}" in rows["pass"]
    assert "forward new, backward new" in rows["promises"]
    assert "1 replace layer: LayerNorm -> DynamicTanh" in rows["changed"]
    assert "1 not selected by where=1" in rows["left"]
    for check in ("graph", "signature", "kept", "frame", "formula"):
        assert check in text[text.index("proven") : text.index("output error")]
    assert "252 -> 253 (+1)" in rows["parameters"]
    assert "verified in" in rows["seconds"]


@pytest.mark.parametrize("width", [60, 120])
def test_the_table_takes_the_width_there_is(model: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("apply", model, "-p", "dyt", *MLP_INPUTS, "--dry-run").stdout.splitlines()
    assert 50 < max(map(len, lines[:-1])) <= width  # the last names the file, unbroken


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    text = run("apply", model, "-p", "dyt", *MLP_INPUTS, "--dry-run").stdout
    assert text.splitlines()[-1].startswith("dry run, would write model.dyt.pt: Sequential")
    assert changed_files(tmp_path, before) == set()


def test_output_pt2(model: Path, tmp_path: Path) -> None:
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "out.pt2")
    x = torch.randn(5, 8)
    program = rewrite.load("out.pt2")
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "out.pt")
    grafted = torch.load("out.pt", weights_only=False)
    assert torch.equal(program.module(x), grafted(x))
    again = run("apply", "out.pt2", "-p", "dyt")
    assert "nothing: the model has no place for this pass" in again.stdout
    assert [r.text for r in rewrite.load("out.dyt.pt2").history] == ["dyt", "dyt"]


def test_output_safetensors_keeps_ties_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    torch.save(GPT2LMHeadModel(config), "gpt2.pt")
    text = run("apply", "gpt2.pt", "-p", "dyt", "-o", "out.safetensors").stdout
    assert "1 tied names left to their partners" in text
    tensors = safetensors.torch.load_file("out.safetensors")
    assert "transformer.h.0.ln_1.alpha" in tensors
    assert "transformer.wte.weight" in tensors
    assert "lm_head.weight" not in tensors
    run("apply", "gpt2.pt", "-p", "dyt")
    grafted = torch.load("gpt2.dyt.pt", weights_only=False)
    assert grafted.lm_head.weight is grafted.transformer.wte.weight
    assert grafted.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_output_onnx(model: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "out.onnx")
    run("export", model, *MLP_INPUTS, "-o", "plain.onnx")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == set()
    x = torch.randn(5, 8)
    loaded = onnxruntime.InferenceSession("plain.onnx", providers=["CPUExecutionProvider"])
    (found,) = loaded.run(None, {loaded.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), mlp()(x), atol=1e-5)


def test_a_model_that_cannot_be_grafted_becomes_a_program(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: Any, module: Any) -> Any:
        raise RewriteError("cannot graft: an edge of 3 was changed")

    monkeypatch.setattr(import_module("rewrite.lowering.graft"), "graft", refuse)
    text = run("apply", model, "-p", "dyt", *MLP_INPUTS).stdout
    assert "not your own class again: cannot graft: an edge of 3 was changed" in text
    assert Path("model.dyt.pt2").is_file()
    assert not Path("model.dyt.pt").exists()
    assert "-o x.pt2" in fails("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "x.pt")


def test_a_timm_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import timm

    timm_model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    torch.save(timm_model, "vit.pt")
    assert "5 replace layer" in run("apply", "vit.pt", "-p", "dyt").stdout
    grafted = torch.load("vit.dyt.pt", weights_only=False)
    assert type(grafted) is type(timm_model)
    assert grafted(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_a_transformers_folder_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained("bert")
    text = run("apply", "bert", "-p", "dyt{where=*.output.LayerNorm}").stdout
    assert "wrote bert.dyt.pt: BertModel" in text
    assert "DyT is known not to train in place of post-norms" in text


FACTORY = """
import torch
from torch import nn

class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(Round.apply(self.norm(x)))

    def example_inputs(self):
        return torch.randn(2, 8)
"""


def test_a_factory_with_an_opaque_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cli_factory_net.py").write_text(FACTORY)
    text = run("apply", "cli_factory_net:Net", "-p", "dyt").stdout
    assert "1 part passes cannot see into: rewrite show cli_factory_net:Net" in text
    assert "wrote Net.dyt.pt: Net" in text
    assert "Round has its own backward" in run("show", "cli_factory_net:Net").stdout
    first = torch.load("Net.dyt.pt", weights_only=False).state_dict()
    run("apply", "cli_factory_net:Net", "-p", "dyt", "-o", "again.pt")
    again = torch.load("again.pt", weights_only=False).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first), "the same seed gives the same random weights"


def test_weights_are_loaded_first(model: Path) -> None:
    torch.manual_seed(5)
    other = nn.Sequential(*(type(m)(*a) for m, a in zip(mlp(), [(8, 16), (16,), (), (16, 4), (4,)], strict=True)))
    torch.save(other.state_dict(), "weights.pt")
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "--weights", "weights.pt")
    assert torch.equal(torch.load("model.dyt.pt", weights_only=False)[0].weight, other[0].weight)


# ---- apply: the report -----------------------------------------------------------------------------------


def test_report(model: Path) -> None:
    torch.save([torch.zeros(2)], "data.pt")
    run("apply", model, "-p", "dyt{where=1}", *MLP_INPUTS, "--report", "r.json", "--seed", "7", "--data", "data.pt")
    report = json.loads(Path("r.json").read_text())
    assert report["model"] == {
        "spec": "model.pt",
        "class": "torch.nn.modules.container.Sequential",
        "weights": None,
        "inputs": ["2x8"],
        "parameters": 252,
    }
    assert report["versions"]["rewrite"] == rewrite.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert (report["seed"], report["pipeline"]) == (7, "dyt{where=1}")
    assert len(report["data"]["sha256"]) == 64
    assert report["capture"]["dimensions"][0]["dynamic"] is True
    assert set(report["capture"]) == {"seconds", "dimensions", "opaque", "notes"}
    (record,) = report["passes"]
    assert record["options"] == {"alpha": 0.5, "where": "1"}
    assert record["changes"] == [{"path": "1", "kind": "replace layer", "detail": "LayerNorm -> DynamicTanh"}]
    assert record["skipped"] == [{"path": "4", "reason": "not selected by where=1"}]
    assert all(check["passed"] for check in record["verification"]["checks"])
    assert record["verification"]["seed"] == 7
    assert report["output"]["path"] == "model.dyt.pt"


def test_a_report_of_a_dry_run_names_no_output(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "--dry-run", "--no-verify", "--report", "r.json")
    assert changed_files(tmp_path, before) == {"r.json"}
    report = json.loads(Path("r.json").read_text())
    assert report["output"] is None
    assert report["passes"][0]["verification"] is None


def test_no_verify_is_said(model: Path) -> None:
    assert "nothing: --no-verify" in run("apply", model, "-p", "dyt", *MLP_INPUTS, "--dry-run", "--no-verify").stdout


@pytest.mark.usefixtures("own_passes")
def test_a_pass_that_changes_nothing_says_why(model: Path) -> None:
    text = run("apply", model, "-p", "picky", *MLP_INPUTS, "--dry-run").stdout
    assert re.search(r"changed +nothing\n", re.sub(" +\n", "\n", text))
    assert "2 a Linear is too plain" in text
    assert re.search("warning +nothing here is worth it", text)
    assert "252, none added or removed" in text


# ---- apply: mistakes -------------------------------------------------------------------------------------


def test_a_broken_promise_leaves_all_as_it_was(model: Path, tmp_path: Path, own_passes: None) -> None:
    Path("out.pt").write_bytes(b"precious")
    before = contents(tmp_path)
    error = fails("apply", model, "-p", "liar", *MLP_INPUTS, "-o", "out.pt", "--report", "r.json")
    assert "pass liar broke its contract (forward same, backward same)" in error
    assert {name.partition("/")[0].partition("-")[0] for name in changed_files(tmp_path, before)} == {"crash"}


def test_a_failing_write_leaves_all_as_it_was(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.pt").write_bytes(b"precious")
    before = contents(tmp_path)

    def fill(value: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    assert fails("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "out.pt") == "cannot write out.pt: No space left on device"
    assert changed_files(tmp_path, before) == set()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.usefixtures("own_passes")
def test_the_unforeseen_keeps_its_traceback(model: Path) -> None:
    result = CliRunner().invoke(app, ["apply", str(model), "-p", "broken", *MLP_INPUTS])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
    assert "interrupted" in run("apply", model, "-p", "interrupted", *MLP_INPUTS, code=130).stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-p", "dyt", "-o", "x.foo"], "cannot write x.foo: unknown suffix .foo; give .pt (your class again), .pt2"),
        (["-p", "dyt", "-o", "x.safetenors"], "unknown suffix .safetenors; did you mean '.safetensors'?"),
        (["-p", "dyt", "-o", "x"], "cannot write x: unknown name without a suffix"),
        (["-p", "dyt", "-o", "model.pt"], "cannot write model.pt: it is an input of this run"),
        (["-p", "dyt", "-o", "nowhere/x.pt"], "cannot write nowhere/x.pt: there is no folder nowhere"),
        (["-p", "dyt", "--weights", "w.pt", "-o", "w.pt"], "there is no file w.pt"),
        (["-p", "dyt", "--report", "model.pt"], "cannot write model.pt: it is an input of this run"),
        (["-p", "dyt", "--report", "model.dyt.pt"], "--report and --output are both model.dyt.pt"),
        (["-p", "dyt", "--data", "data.pt"], "--data: there is no file data.pt"),
        ([], "no pass is given: add --pass NAME"),
        (["-p", "dyt,dyt"], "--pass takes one pass, not 'dyt,dyt'"),
        (["-p", "dyt", "--pipeline", "dyt"], "--pass and --pipeline are two ways to say the same"),
        (["-p", "dty"], "there is no pass 'dty'; did you mean 'dyt'?"),
        (
            ["--pipeline", "dyt,dyt{alpha=x}"],
            "option 'alpha' of pass 'dyt' expects float, got 'x'\n  dyt,dyt{alpha=x}\n          ^",
        ),
        (["--pipeline", "dyt{alhpa=1}"], "pass 'dyt' has no option 'alhpa'; did you mean 'alpha'?\n  dyt{alhpa=1}\n      ^"),
        (["-p", "dyt{alpha=1"], "expected an option or '}'\n  dyt{alpha=1\n             ^"),
    ],
)
def test_mistakes_are_told_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    def work(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was read")

    monkeypatch.setattr("rewrite.sources.models.read_model", work)
    before = contents(tmp_path)
    assert expected in fails("apply", model, *arguments)
    assert changed_files(tmp_path, before) == set()


def test_a_selector_that_matches_nothing(model: Path) -> None:
    error = fails("apply", model, "-p", "dyt{where=blocks.*}", *MLP_INPUTS)
    assert error == "where=blocks.* matches none of the 2 places this pass can change; there are 1, 4"


def _saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: None, "there is no file bad.pt"),
        (lambda path: path.touch(), "bad.pt is empty"),
        (lambda path: path.write_bytes(b"GIF89a" * 50), "bad.pt is not a file saved by torch.save"),
        (lambda path: path.write_bytes(Path("model.pt").read_bytes()[:-700]), "bad.pt is damaged or cut short"),
        (_saved(mlp().state_dict()), "bad.pt holds a dict with the keys 0.weight, 0.bias, 1.weight, ..., not a module"),
        (_saved(_Attack()), "--trust-pickle"),
        (_saved(torch.zeros(3)), "bad.pt holds a tensor, not a module"),
    ],
    ids=["missing", "empty", "foreign", "cut", "state_dict", "hostile", "tensor"],
)
def test_bad_files(model: Path, tmp_path: Path, write: Callable[[Path], None], expected: str) -> None:
    write(Path("bad.pt"))
    before = contents(tmp_path)
    for command in (("apply", "bad.pt", "-p", "dyt", "-o", "out.pt"), ("show", "bad.pt")):
        error = fails(*command)
        assert expected in error
        assert "\n" not in error
    assert changed_files(tmp_path, before) == set()


def test_bad_programs(model: Path) -> None:
    Path("bad.pt2").write_bytes(b"no zip")
    for arguments, expected in (
        (["bad.pt2"], "bad.pt2"),
        (["bad.pt2", "-o", "x.pt"], "bad.pt2 holds a program and no class to give back; write x.pt2"),
        (["bad.pt2", "--inputs", "2x8"], "--inputs does not go with bad.pt2"),
        (["bad.pt2", "--weights", "model.pt"], "--weights does not go with bad.pt2"),
        (["other.pt2"], "there is no file other.pt2"),
    ):
        assert expected in fails("apply", *arguments, "-p", "dyt")


def test_inputs_that_cannot_be_inferred(model: Path) -> None:
    assert "pass --inputs" in fails("apply", model, "-p", "dyt")


# ---- names of results ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("models/net.v2.pt", "models/net.v2.dyt.probe.pt"),
        ("models/net.pth", "models/net.dyt.probe.pth"),
        ("models/net.pt2", "models/net.dyt.probe.pt2"),
        ("models", "models.dyt.probe.pt"),
        ("hf:models", "models.dyt.probe.pt"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k.dyt.probe.pt"),
        ("package.module:make.net", "net.dyt.probe.pt"),
    ],
)
def test_default_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert plan(spec, ["dyt", "probe"], None).path == Path(expected)


# ---- passes, show, export, help --------------------------------------------------------------------------


def test_passes_text_and_json_come_from_one_description() -> None:
    listed = json.loads(run("passes", "--json").stdout)
    assert [each["name"] for each in listed] == list(registry.pass_names())
    text = " ".join(run("passes").stdout.split())
    assert all(each["name"] in text and " ".join(each["summary"].split()) in text for each in listed)
    one = json.loads(run("passes", "dyt", "--json").stdout)
    assert one == next(each for each in listed if each["name"] == "dyt")
    description = describe(registry.get_pass("dyt"))
    assert one["contract"] == {"forward": "new", "backward": "new"}
    assert [option["name"] for option in one["options"]] == [option.name for option in description.options]
    page = " ".join(run("passes", "dyt").stdout.split())
    assert "promises forward new, backward new" in page
    assert "dyt{alpha=0.5 where=*}" in page
    for option in one["options"]:
        assert {option["name"], option["type"], option["default"]} <= set(page.split())
    assert "arXiv 2503.10622" in page


def test_passes_of_an_unknown_name() -> None:
    assert "there is no pass 'dit'; did you mean 'dyt'?" in fails("passes", "dit")


def test_a_pass_that_cannot_be_had_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = EntryPoint("lost", "no_such_module:Lost", registry.PASSES)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*entry_points(group=group), lost])
    text = " ".join(run("passes").stdout.split())
    assert "cannot be imported" in text
    assert "dyt" in text


def test_show(model: Path) -> None:
    text = run("show", model, *MLP_INPUTS).stdout
    assert ESCAPE not in text
    for expected in (
        "torch.nn.modules.container.Sequential",
        "252 float32",
        "float32 [2 dynamic, 8]",
        "2 Linear, 2 LayerNorm, 1 GELU",
        "LayerNorm [16] eps 1e-05",
        "nothing: passes see every part",
    ):
        assert expected in text


def test_export_writes_no_modules(model: Path) -> None:
    assert "give an .onnx or .pt2 file" in fails("export", model, "-o", "x.pt")
    run("export", model, *MLP_INPUTS, "-o", "x.pt2", "-p", "dyt")
    assert [record.name for record in rewrite.load("x.pt2").history] == ["dyt"]


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['rewrite', 'apply', '--help']\n"
        "from rewrite.cli.commands import main\n"
        "try: main()\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    text = fresh(code, ROOT)
    assert text.endswith("0 False False")
    assert "--trust-pickle" in text


@pytest.mark.parametrize("command", [["cli.py"], ["-m", "rewrite"]], ids=" ".join)
def test_the_ways_to_start_it(command: list[str]) -> None:
    words = [sys.executable, *command, "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, rewrite.__version__)


def test_wrong_usage_exits_2() -> None:
    assert "No such option" in run("apply", "model.pt", "--bogus", code=2).stderr
    assert "No such command" in run("bogus", code=2).stderr
