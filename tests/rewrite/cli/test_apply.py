"""`rewrite apply`: what it prints, what it writes, its report."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import rewrite
from rewrite.errors import RewriteError
from rewrite.files.writers import plan
from tests.rewrite.cli.running import ESCAPE, MLP_INPUTS, changed_files, contents, fails, fresh, mlp, run


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
    run("apply", model, "-p", "dyt{where=1}", *MLP_INPUTS, "-o", "out.pt2")
    x = torch.randn(5, 8)
    program = rewrite.load("out.pt2")
    run("apply", model, "-p", "dyt{where=1}", *MLP_INPUTS, "-o", "out.pt")
    grafted = torch.load("out.pt", weights_only=False)
    assert torch.equal(program.module(x), grafted(x))
    run("apply", "out.pt2", "-p", "dyt")
    assert [r.text for r in rewrite.load("out.dyt.pt2").history] == ["dyt{where=1}", "dyt"]


def test_a_run_that_changes_nothing_writes_no_model(model: Path, tmp_path: Path) -> None:
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "out.pt2")
    before = contents(tmp_path)
    text = run("apply", "out.pt2", "-p", "dyt", "--report", "r.json").stdout
    assert "no layer of it is a LayerNorm or RMSNorm" in text
    assert "nothing is written: the pass changed nothing" in text
    assert changed_files(tmp_path, before) == {"r.json"}
    assert json.loads(Path("r.json").read_text())["output"] is None
    run("export", "out.pt2", "-p", "dyt", "-o", "again.pt2")
    assert Path("again.pt2").is_file(), "to export is to ask for the file"


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_without_a_dtype_have_the_model_s(model: Path, dtype: torch.dtype) -> None:
    torch.save(mlp().to(dtype), "cast.pt")
    assert "2 replace layer" in run("apply", "cast.pt", "-p", "dyt", *MLP_INPUTS, "--dry-run").stdout


def test_weights_are_loaded_first(model: Path) -> None:
    torch.manual_seed(5)
    other = nn.Sequential(*(type(m)(*a) for m, a in zip(mlp(), [(8, 16), (16,), (), (16, 4), (4,)], strict=True)))
    torch.save(other.state_dict(), "weights.pt")
    run("apply", model, "-p", "dyt", *MLP_INPUTS, "--weights", "weights.pt")
    assert torch.equal(torch.load("model.dyt.pt", weights_only=False)[0].weight, other[0].weight)


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
    assert (record["options"]["alpha"], record["options"]["where"]) == (0.5, "1")
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
