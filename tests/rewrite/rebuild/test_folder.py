"""Programs written as folders that their models' own libraries read: transformers, timm, the user's own classes."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import Program, RewriteError
from rewrite.rebuild.fit import fit_class
from rewrite.sources.models import read_model
from tests.models.zoo import timm_model
from tests.rewrite.cli.running import fresh, run


@dataclass
class Sizes:
    width: int = 6
    hidden: int = 8
    layers: int = 1


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.hidden)
        self.down = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A class of one's own with one record of its sizes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Ratio(nn.Module):
    """The hidden size follows in code from a width that is held under another name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Block(Sizes(width, 2 * width))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(Sizes())


def grown(model: nn.Module, text: str = "expand{ffn=2x}") -> Program:
    return rewrite.apply(model, text, args=(torch.randn(3, 5, 6),), verify=False)


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def test_a_class_of_ones_own_by_its_constructor(tmp_path: Path) -> None:
    program = grown(net())
    assert rewrite.save(program, tmp_path / "big") == tmp_path / "big"
    note = json.loads((tmp_path / "big" / "rewrite.json").read_text())
    assert note["arguments"]["sizes"]["arguments"] == {"width": 6, "hidden": 16, "layers": 1}
    assert "model = Net(sizes=Sizes(width=6, hidden=16, layers=1))" in note["python"]
    assert sorted(p.name for p in (tmp_path / "big").iterdir()) == ["model.safetensors", "rewrite.json"]
    names: dict[str, Any] = {}
    line = note["python"].replace("big/", f"{tmp_path}/big/").replace(f"from {__name__} import Net; ", "")
    exec(line.replace(f"from {__name__} import Net, Sizes; ", ""), {"Net": Net, "Sizes": Sizes}, names)
    x = torch.randn(2, 5, 6)
    assert torch.equal(names["model"].eval()(x), program.module.eval()(x))
    with pytest.raises(RewriteError, match="whose code would run: allow it with --trust-pickle"):
        read_model(str(tmp_path / "big"))
    model = read_model(str(tmp_path / "big"), trust=True).model
    assert torch.equal(model.eval()(x), program.module.eval()(x))
    again = grown(model, "expand{ffn=+3}")
    assert fit_class(again).edits == {("sizes", "hidden"): 19}


def test_what_no_constructor_says_is_a_program_with_the_reason(tmp_path: Path) -> None:
    program = grown(Ratio(6))
    with pytest.warns(UserWarning, match="takes width, which its instance does not hold as a plain attribute"):
        written = rewrite.save(program, tmp_path / "big")
    assert written == tmp_path / "big.pt2"
    assert [p.name for p in tmp_path.iterdir()] == ["big.pt2"]
    with pytest.raises(RewriteError, match="comes from a file"):
        fit_class(rewrite.load(written))


def test_one_layer_of_several_has_no_setting(tmp_path: Path) -> None:
    program = grown(Net(Sizes(layers=2)), "expand{ffn=2x where=ffn.0}")
    with pytest.warns(UserWarning, match=r"no settings of its class give its sizes: .*\.weight would be"):
        rewrite.save(program, tmp_path / "big")


def test_layers_of_a_pass_have_no_place(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no place for blocks\.\*\.norm\.alpha"):
        rewrite.save(rewrite.apply(net(), "dyt", args=(torch.randn(3, 5, 6),)), tmp_path / "big")


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    rewrite.save(grown(net()), tmp_path / "big")
    with pytest.raises(RewriteError, match="the folder is there and not empty"):
        rewrite.save(grown(net()), tmp_path / "big")
    with pytest.raises(RewriteError, match="there is no folder"):
        rewrite.save(grown(net()), tmp_path / "nowhere" / "big")


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(RewriteError, match="has no room"):
        rewrite.save(grown(net()), tmp_path / "big")
    assert list(tmp_path.iterdir()) == []


def test_transformers_from_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpt().save_pretrained("small")
    Path("small/tokenizer.json").write_text('{"any": 1}')
    Path("small/code.py").write_text("raise SystemExit")
    told = run("apply", "small", "-p", "expand{ffn=2x}", "-o", "big", "--no-verify").stdout
    assert told.splitlines()[-1] == "wrote big: a transformers folder, read it with GPT2LMHeadModel.from_pretrained"
    assert json.loads(Path("big/config.json").read_text())["n_inner"] == 128
    assert {p.name for p in Path("big").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r}); import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "for n in ('nms', 'qnms'): library.define(n + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "small, big = A.from_pretrained('small'), A.from_pretrained('big')\n"
        "x, kw = torch.tensor([[3, 4, 5]]), dict(max_new_tokens=8, do_sample=False)\n"
        "print(torch.equal(small.generate(x, **kw), big.generate(x, **kw)), 'rewrite' in sys.modules)"
    )
    assert fresh(code, tmp_path) == "True False"


_LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
_T5 = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "decoder_start_token_id": 0}
GENERATING = {
    "LlamaForCausalLM": {**_LLAMA, "num_hidden_layers": 1},
    "T5ForConditionalGeneration": {**_T5, "num_layers": 1},
}


@pytest.mark.parametrize("name", GENERATING)
def test_what_was_grown_generates_with_a_cache_as_before(name: str, tmp_path: Path) -> None:
    import transformers

    kind = getattr(transformers, name)
    small = kind(kind.config_class(**GENERATING[name], vocab_size=40, eos_token_id=None)).eval()
    ids = torch.arange(18).view(2, 9)
    kwargs = {"input_ids": ids} | ({"decoder_input_ids": ids} if small.config.is_encoder_decoder else {})
    rewrite.save(rewrite.apply(small, "expand{ffn=2x}", kwargs=kwargs, verify=False), tmp_path / "big")
    big = kind.from_pretrained(tmp_path / "big").eval()
    made = [model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True) for model in (small, big)]
    assert big.num_parameters() > small.num_parameters()
    assert made[0].shape[1] > 12
    assert torch.equal(*made)


def test_heads_or_head_size_is_decided_by_the_outputs() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40, "bos_token_id": 0}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    model = Qwen2ForCausalLM(config)
    program = rewrite.apply(model, "expand{heads=2x}", kwargs={"input_ids": torch.arange(18).view(2, 9)}, verify=False)
    edits = {str(path[-1]): value for path, value in fit_class(program).edits.items()}
    assert edits == {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}


@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_that_were_dropped_are_fewer_layers(layer: int, tmp_path: Path) -> None:
    """The others move up, in lists that say something of each layer too; with a cache it generates the same."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 40, "bos_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "eos_token_id": None}
    sliding = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
    torch.manual_seed(0)
    model, ids = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **sliding, use_sliding_window=True)), torch.arange(18)
    program = rewrite.apply(model, f"drop-blocks{{layers={layer}}}", kwargs={"input_ids": ids.view(2, 9)}, verify=False)
    assert rewrite.save(program, tmp_path / "short") == tmp_path / "short"
    short: Any = Qwen3ForCausalLM.from_pretrained(tmp_path / "short")
    assert short.config.layer_types == [kind for i, kind in enumerate(sliding["layer_types"]) if i != layer]
    for mine, own in ((0, 1), (1, 2)) if layer == 0 else ((0, 0), (1, 2)):
        assert torch.equal(short.model.layers[mine].mlp.up_proj.weight, model.model.layers[own].mlp.up_proj.weight)
    said = [short.generate(ids[None, :9], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said)


def test_what_is_compared_is_a_block_of_the_old_number(tmp_path: Path) -> None:
    """Gradients too: a block that moved up has another name in the folder."""
    program = rewrite.apply(
        timm_model("test_vit"), "drop-blocks{layers=0}", args=(torch.randn(2, 3, 160, 160),), verify=False
    )
    assert rewrite.save(program, tmp_path / "short") == tmp_path / "short"
    assert json.loads((tmp_path / "short" / "rewrite.json").read_text())["arguments"]["depth"] == 5


NOTES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "cannot be read: "),
    "a list": ("[]", "cannot be read: "),
    "no model": ('{"format": 1, "model": 3, "arguments": {}}', "it names no model"),
    "a later format": ('{"format": 2}', "is of format 2, this version reads 1"),
    "a file": ('{"format": 1, "model": "timm:test_vit", "arguments": {"checkpoint_path": "x"}}', "checkpoint_path among"),
    "no weights": (
        '{"format": 1, "model": "timm:test_vit", "arguments": {}}',
        "has a rewrite.json but no model.safetensors",
    ),
    "no class": ('{"format": 1, "model": "os:system", "arguments": {"command": "x"}}', "os:system is no class of a model"),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_that_are_refused(name: str, tmp_path: Path) -> None:
    text, words = NOTES[name]
    (tmp_path / "rewrite.json").write_text(text)
    if name != "no weights":
        (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RewriteError, match=words):
        read_model(str(tmp_path), trust=True)


def test_timm_by_name_and_arguments(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    timm = pytest.importorskip("timm")
    model = timm_model("test_vit", img_size=64, num_classes=5)
    program = rewrite.apply(model, "expand{ffn=2x}", args=(torch.randn(2, 3, 64, 64),), verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewrite.save(program, tmp_path / "big")
    note = json.loads((tmp_path / "big" / "rewrite.json").read_text())
    assert note["model"] == "timm:test_vit"
    assert note["arguments"] == {"num_classes": 5, "img_size": [64, 64], "mlp_ratio": 6}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(read_model(str(tmp_path / "big")).model.eval()(x), program.module.eval()(x))
    assert sys.modules["timm"] is timm
