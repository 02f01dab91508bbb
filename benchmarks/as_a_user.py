"""Passes on small models of ten kinds, and on ones that no test names, as a new user runs them: by the command line alone.

    python benchmarks/as_a_user.py depth|memory|normalization|strangers [--models vit,gpt2,...] [--passes NAME,...]
    python benchmarks/as_a_user.py normalization --letters      # A applied, L left alone, R refused, - no place, F fault

Models lie in the folder as their libraries write them: timm's pickled, transformers' by `save_pretrained`. Each cell is one
`rewrite apply` in this process (a model is captured once), its output kept beside the model: `applied` where it wrote a file
and what was read from that runs, `refused` or `unchanged` with the reason that it gave; all else is a fault. For memory,
what was written is the model's own class (a `.pt` where the library pickles, else grafted from the `.pt2`), and what a step
keeps is counted on it: in KiB before, in KiB after, how many times less, and the relative error of the gradient.
Cells that the folder has are not made again.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from typer.testing import CliRunner

import rewrite
from rewrite.cli.commands import app
from rewrite.cli.job import Model, read_data
from rewrite.pipeline.registry import get_pass, pass_names
from rewrite.proof.estimate import nearness
from rewrite.torch_private import pytree
from rewrite.training.saved import _Ledger
from tests.models.zoo import import_timm

timm = import_timm()  # before transformers, which asks for torchvision too
import transformers  # noqa: E402

VOCAB, TOKENS, SIZE = 500, 32, 64
DEPTH = (
    "drop-attention{layers=auto:1}",
    "drop-attention{layers='1,2'}",
    "drop-ffn{layers=auto:1}",
    "drop-blocks{layers=auto:1}",
    "drop-attention{layers=1-2 bound=9},ffn-fusion{bound=9}",
    "ffn-fusion",
    "parallel-block{layers='1,2'}",
    "parallelize-blocks{pairs='1-2'}",
    "shallow{layers='1-2'}",
    "merge-linears",
    "merge-linears,split-linears",
    "merge-convs",
    "layer-merge",
    "fold-batchnorm,layer-merge",
    "stochastic-depth",
    "layer-drop",
    "random-ltd",
)
MEMORY = ("fit-memory{budget=0.25}",)
NORMALIZATION = (
    "rmsnorm",
    "rmsnorm{centering=keep}",
    "rmsnorm{compressed=true}",
    "rmsnorm{centering=keep},layernorm",
    "layernorm{mode=swap}",
    "scalenorm",
    "fold-affine",
    "fold-batchnorm",
    "rmsnorm{centering=keep},fold-affine,defer-norm",
    "dyt{calibrate=lsq}",
    "derf{calibrate=lsq}",
    "eln{calibrate=formula}",
    "unified-norm",
    "power-norm,merge-norms",
    "rep-batchnorm",
    "peri-ln{calibrate=rms}",
    "norm-scaling",
    "gpas",
    "normformer",
    "deepnorm",
    "dual-patchnorm",
    "rezero",
    "layerscale",
    "norm-free{activation=relu}",
    "weight-standardization",
    "ghost-batchnorm",
    "batch-channel-norm",
    "instance-batch-norm",
    "online-norm",
    "evonorm",
)
STRANGERS = (
    "dyt",
    "rmsnorm{centering=keep}",
    "fold-affine",
    "fold-batchnorm",
    "few-bit",
    "compress-activations",
    "random-prune{sparsity=0.5}",
    "expand{ffn=2x}",
    "merge-linears",
    "drop-blocks{layers=auto:1}",
)
FAMILIES = {"depth": DEPTH, "memory": MEMORY, "normalization": NORMALIZATION, "strangers": STRANGERS}


@dataclass(frozen=True)
class Kind:
    """A model as a file or folder, how to make it, and samples as a user has them."""

    make: Callable[[], nn.Module]
    is_timm: bool = True
    pixels: int = 64
    is_seq2seq: bool = False

    def data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        if self.is_timm:
            return torch.randn(8, 3, self.pixels, self.pixels, generator=generator)
        tokens = torch.randint(5, VOCAB, (8, TOKENS), generator=generator)
        return {"input_ids": tokens, "decoder_input_ids": tokens} if self.is_seq2seq else tokens


def _timm(name: str, **options: Any) -> Kind:
    return Kind(lambda: timm.create_model(name, num_classes=10, **options))


def _hf(config: str, model: str, **sizes: Any) -> Kind:
    own = {"vocab_size": VOCAB, **sizes}
    return Kind(lambda: getattr(transformers, model)(getattr(transformers, config)(**own)), is_timm=False)


_SIZES = {"hidden_size": SIZE, "num_hidden_layers": 3, "num_attention_heads": 4}
_ENCODER = {**_SIZES, "intermediate_size": 4 * SIZE}
_XGLM = {"d_model": SIZE, "ffn_dim": 4 * SIZE, "num_layers": 3, "attention_heads": 4, "pad_token_id": 1}
_T5 = {"d_model": SIZE, "d_ff": 4 * SIZE, "d_kv": 16, "num_heads": 4, "num_layers": 3, "decoder_start_token_id": 0}
_SWIN = {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
KINDS = {
    "vit": _timm("vit_tiny_patch16_224", img_size=64, depth=3),
    "convnext": _timm("convnext_atto"),
    "resnet": _timm("resnet18"),
    "swin": replace(_timm("swin_tiny_patch4_window7_224", **_SWIN), pixels=56),
    "gpt2": _hf("GPT2Config", "GPT2LMHeadModel", n_embd=SIZE, n_layer=3, n_head=4, n_positions=64),
    "opt": _hf("OPTConfig", "OPTForCausalLM", **_SIZES, ffn_dim=4 * SIZE, word_embed_proj_dim=SIZE),
    "llama": _hf("LlamaConfig", "LlamaForCausalLM", **_ENCODER, num_key_value_heads=2),
    "gpt_neox": _hf("GPTNeoXConfig", "GPTNeoXForCausalLM", **_ENCODER),
    "bert": _hf("BertConfig", "BertForMaskedLM", **_ENCODER),
    "t5": replace(_hf("T5Config", "T5ForConditionalGeneration", **_T5), is_seq2seq=True),
    "eva02": replace(_timm("eva02_tiny_patch14_224", img_size=56, depth=3), pixels=56),
    "xglm": _hf("XGLMConfig", "XGLMForCausalLM", **_XGLM),
}
#: Named by no test.
UNNAMED = {
    "starnet_s1": _timm("starnet_s1"),
    "mambaout_femto": _timm("mambaout_femto"),
    "ghostnetv3_100": _timm("ghostnetv3_100"),
    "mobilenetv4_conv_small": _timm("mobilenetv4_conv_small"),
    "vit_rope": _timm("vit_base_patch16_rope_224", img_size=64, depth=3, embed_dim=96, num_heads=4),
    "hunyuan": _hf("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", **_ENCODER, num_key_value_heads=2, head_dim=16),
    "dots1": _hf("Dots1Config", "Dots1ForCausalLM", **_ENCODER, **_EXPERTS, n_shared_experts=1, num_key_value_heads=4),
    "roc_bert": _hf("RoCBertConfig", "RoCBertForMaskedLM", **_ENCODER, enable_pronunciation=False, enable_shape=False),
    "granite_swa": _hf("GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM", **_ENCODER, num_key_value_heads=2),
    "youtu": _hf("YoutuConfig", "YoutuForCausalLM", **_ENCODER, **_LATENT),
}
EVERY = {**KINDS, **UNNAMED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--models")
    parser.add_argument("--passes", default="", help="those whose text has one of these")
    parser.add_argument("--folder", type=Path, default=Path("build/as-a-user"))
    parser.add_argument("--trust-pickle", action="store_true", help="where timm is no installed package")
    parser.add_argument("--letters", action="store_true", help="a letter a cell")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = [text for text in FAMILIES[options.family] if any(part in text for part in options.passes.split(","))]
    names = (options.models or ",".join(UNNAMED if options.family == "strangers" else KINDS)).split(",")
    print(f"| pass | {' | '.join(names)} |\n| --- {'| --- ' * len(names)}|", flush=True)
    notes: dict[str, dict[str, list[str]]] = {}
    for text in chosen:
        cells = []
        for name in names:
            outcome = tried(options.folder, name, text, options.family, trust=options.trust_pickle)
            cells.append(letter(outcome) if options.letters else outcome.split(":")[0])
            if ":" in outcome:
                notes.setdefault(outcome, {}).setdefault(text, []).append(name)
        print(f"| `{text}` | {' | '.join(cells)} |", flush=True)
    print()
    for outcome, places in notes.items():
        print(f"- {outcome}:", "; ".join(f"`{text}` on {', '.join(on)}" for text, on in places.items()))


def letter(outcome: str) -> str:
    """What one command came to, in a letter; "-" where the model lacks what the pass is for."""
    word, _, reason = outcome.partition(": ")
    if word == "unchanged" and reason in {"no place", *(get_pass(name).absence for name in pass_names())}:
        return "-"
    return {"applied": "A", "unchanged": "L", "refused": "R"}.get(word, "F")


def tried(folder: Path, name: str, text: str, family: str, *, trust: bool = False) -> str:
    """What one command came to."""
    source, samples = written(folder, name)
    slug = re.sub(r"[^\w.]+", "-", f"{name}.{text}").strip("-")
    out = folder / f"{slug}{'.pt' if family == 'memory' and EVERY[name].is_timm else '.pt2'}"
    log = folder / f"{slug}.txt"
    if not log.exists():
        out.unlink(missing_ok=True)
        words = ["apply", str(source), "--pipeline", text, "-o", str(out), "--data", str(samples)]
        words += ["--trust-pickle"] * trust
        began = time.process_time()
        result = CliRunner().invoke(app, words)
        taken = time.process_time() - began
        log.write_text(
            f"$ rewrite {' '.join(words)}\n{result.output}\n{result.exit_code} {taken:.0f} s {result.exception!r}\n"
        )
    *_, said, end = filter(None, log.read_text().splitlines())
    if end.startswith("2 ") and "broke its contract" not in said:
        return f"refused: {said.removeprefix('error: ')}"
    if not end.startswith("0 "):
        return f"FAULT: {end}: {said}"
    if not out.exists():
        return f"unchanged: {_reason(log.read_text())}"
    try:
        return figures(out, source) if family == "memory" else runs(out)
    except Exception as error:  # whatever it is, it is a fault of ours
        return f"FAULT: what was written: {error!r}"


def _reason(text: str) -> str:
    """The first reason beside `left alone`, in one line."""
    found = re.search(r"left alone +\d+ (.*?)\n {16}", text, re.DOTALL)
    return " ".join(found[1].split()) if found else "no place"


def written(folder: Path, name: str) -> tuple[Path, Path]:
    """A model's file or folder, and its samples."""
    kind = EVERY[name]
    source, samples = folder / (f"{name}.pt" if kind.is_timm else name), folder / f"{name}-data.pt"
    if not samples.exists():
        torch.manual_seed(0)
        model: Any = kind.make()
        _ = torch.save(model, source) if kind.is_timm else model.save_pretrained(source)
        torch.save(kind.data(), samples)
    return source, samples


@functools.cache
def read(model: Model) -> tuple[rewrite.Program, nn.Module | None]:
    """The program and the module of what a command is given: none of them is changed."""
    return _read(model, lambda step: None, _data(model))


def _data(model: Model) -> Any:
    path = Path(model.spec)
    return read_data(path.with_name(f"{path.stem}-data.pt"))


def runs(file: Path) -> str:
    program = rewrite.load(file)
    program.module.eval()(*program.example_args, **program.example_kwargs)
    return "applied"


def figures(file: Path, source: Path) -> str:
    """What the model's own class keeps before and after, and how near its gradient is."""
    before, original = read(Model(str(source)))
    assert original is not None
    model = torch.load(file, weights_only=False) if file.suffix == ".pt" else rewrite.graft(rewrite.load(file), original)
    assert type(model) is type(original)
    calls = (before.example_args, dict(before.example_kwargs))
    kept = [kept_by(module, *calls) for module in (original, model)]
    exact, made = (torch.cat([g.flatten() for g in gradients(m, *calls)]) for m in (original, model))
    return f"{kept[0] / 1024:,.0f} to {kept[1] / 1024:,.0f} ({kept[0] / kept[1]:.1f}), {nearness(exact, made)[0]:.1e}"


def kept_by(module: nn.Module, args: Any, kwargs: Any) -> int:
    """The bytes of unique storages that a step keeps, those of parameters, buffers and inputs aside."""
    own = [*module.parameters(), *module.buffers(), *(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))]
    ledger = _Ledger(own)
    torch.manual_seed(0)
    with ledger.open():
        ledger.held = module.train()(*args, **kwargs)
    return sum(count for _, count in ledger.found.values())


def gradients(module: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Of a random projection of the outputs."""
    torch.manual_seed(0)
    found = pytree.tree_leaves(module.train()(*args, **kwargs))
    outputs = [t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]
    own = torch.Generator().manual_seed(0)
    loss = torch.stack([(t * torch.randn(t.shape, generator=own)).sum() for t in outputs]).sum()
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]


_read = Model.read

if __name__ == "__main__":
    Model.read = lambda self, listener, data=None: read(self)  # type: ignore[method-assign]
    main()
