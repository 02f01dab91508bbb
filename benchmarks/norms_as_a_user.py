"""Every pass of normalization on ten small models by the command line: applied, nothing there, left alone, refused.

    python benchmarks/norms_as_a_user.py run [MODEL ...] [--prove]      # goes on where the last run stopped
    python benchmarks/norms_as_a_user.py report                         # the table of docs/benchmarks.md

Each cell is one `rewrite apply MODEL --pipeline TEXT --dry-run` in this process, which captures a model once; `--no-verify`
but for `--prove`. Models lie in build/norms as their libraries write them. One line a cell in build/norms-as-a-user.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewrite.cli.commands import app  # noqa: E402
from rewrite.cli.job import Model  # noqa: E402
from tests.models.zoo import import_timm  # noqa: E402

timm = import_timm()  # before transformers, which asks for torchvision too
import transformers  # noqa: E402

FOLDER, RESULTS = ROOT / "build" / "norms", ROOT / "build" / "norms-as-a-user.jsonl"
PASSES = (
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
_SIZES = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_OPT = {**_SIZES, "ffn_dim": 256, "word_embed_proj_dim": 64, "pad_token_id": 1}
_T5 = {
    "vocab_size": 500,
    "d_model": 64,
    "d_ff": 256,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
_GPT2 = {"vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **options)


def _hf(kind: str, head: str, **sizes: Any) -> Callable[[], nn.Module]:
    config = {"GPT2": "GPT2Config"}.get(kind, f"{kind}Config")
    return lambda: getattr(transformers, f"{kind}{head}")(getattr(transformers, config)(**sizes))


_SWIN = {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": _timm("vit_tiny_patch16_224", img_size=64, depth=2),
    "swin": _timm("swin_tiny_patch4_window7_224", **_SWIN),
    "convnext": _timm("test_convnext"),
    "resnet": _timm("test_resnet"),
    "gpt2": _hf("GPT2", "LMHeadModel", **_GPT2),
    "opt": _hf("OPT", "ForCausalLM", **_OPT),
    "gpt_neox": _hf("GPTNeoX", "ForCausalLM", **_SIZES),
    "llama": _hf("Llama", "ForCausalLM", **_SIZES),
    "bert": _hf("Bert", "ForMaskedLM", **_SIZES),
    "t5": _hf("T5", "ForConditionalGeneration", **_T5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--prove", action="store_true", help="with the proof of each pass")
    options = parser.parse_args()
    if options.action == "report":
        report()
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = {(row["model"], row["text"]) for row in rows()}
    for name in options.models or MODELS:
        for text in PASSES:
            if (name, text) not in done:
                row = {"model": name, "text": text, **command(name, text, options.prove)}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, text, row["what"], row["why"][:100], flush=True)


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def command(name: str, text: str, prove: bool) -> dict[str, str]:
    """What one command comes to, and the first reason that it gives."""
    source, samples, report = written(name)
    words = ["apply", str(source), "--pipeline", text, "--dry-run", "--report", str(report), "--trust-pickle"]
    words += ([] if prove else ["--no-verify"]) + (["--data", str(samples)] if "calibrate" in text else [])
    report.unlink(missing_ok=True)
    result = CliRunner().invoke(app, words)
    if result.exit_code == 2:
        return {"what": "refused", "why": " ".join(result.output.split())}
    if result.exit_code != 0 or not report.exists():
        return {"what": "FAULT", "why": f"{result.exit_code} {result.exception!r} {result.output[-300:]}"}
    last = json.loads(report.read_text())["passes"][-1]
    reasons = [skip["reason"] for skip in last["skipped"]]
    what = f"applied {len(last['changes'])}" if last["changes"] else "left alone" if reasons else "nothing there"
    return {"what": what, "why": reasons[0] if reasons else ""}


def written(name: str) -> tuple[Path, Path, Path]:
    """A model's file or folder, its samples, and where the report goes."""
    torch.manual_seed(0)
    vision = name in ("vit", "swin", "convnext", "resnet")
    source, samples = FOLDER / (f"{name}.pt" if vision else name), FOLDER / f"{name}-data.pt"
    if not samples.exists():
        model: Any = MODELS[name]()
        _ = torch.save(model, source) if vision else model.save_pretrained(source)
        size = 56 if name == "swin" else 64
        torch.save(torch.randn(8, 3, size, size) if vision else torch.randint(5, 500, (8, 16)), samples)
    return source, samples, FOLDER / f"{name}.json"


def report() -> None:
    """The table, and each reason once a pass."""
    found = {(row["model"], row["text"]): row for row in rows()}
    names = [name for name in MODELS if any(model == name for model, _ in found)]
    print(f"| pass | {' | '.join(names)} |\n| --- {'| --- ' * len(names)}|")
    for text in PASSES:
        print(f"| `{text}` | {' | '.join(found.get((name, text), {'what': ''})['what'] for name in names)} |")
    print()
    for text in PASSES:
        cells = {name: found[name, text] for name in names if (name, text) in found}
        reasons = {name: cell["why"] for name, cell in cells.items() if not cell["what"].startswith(("applied", "nothing"))}
        by_reason = {why: [name for name in reasons if reasons[name] == why] for why in reasons.values()}
        print(
            f"- `{text}`: " + "; ".join(f"{', '.join(group)}: {why}" for why, group in by_reason.items())
        ) if by_reason else None


_read = Model.read
_once = functools.cache(lambda spec, trust: _read(Model(spec, trust=trust), lambda step: None))

if __name__ == "__main__":
    Model.read = lambda self, listener, data=None: _once(self.spec, self.trust)  # type: ignore[method-assign]
    main()
