"""Models grown from the command line and read by their own library, in a process that cannot import this package.

    python benchmarks/back.py [NAME ...]

Each model is built small with random weights by its library and written as that does; `rewrite apply MODEL -p STEP -o
FOLDER` grows it, with its proof; then a process whose path holds the same libraries but not this package reads both,
compares outputs in evaluation, generates greedily with a cache where the model generates, and trains one step.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Model:
    """A transformers class with the sizes of its configuration, or a timm name; and how it is grown."""

    kind: str
    sizes: str
    step: str
    inputs: str


TEXT = "input_ids=torch.randint(3, 60, (2, 9))"
MODELS = {
    "Llama": Model(
        "LlamaForCausalLM",
        "hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, "
        "vocab_size=64",
        "expand{hidden=48 ffn=2x heads=+2 layers=+1}",
        TEXT,
    ),
    "GPT-2": Model(
        "GPT2LMHeadModel",
        "n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64",
        "expand{method=lemon hidden=2x heads=2x ffn=2x untie=true}",
        TEXT,
    ),
    "OPT": Model(
        "OPTForCausalLM",
        "hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, max_position_embeddings=64, "
        "word_embed_proj_dim=32",
        "expand{ffn=2x layers=+1}",
        TEXT,
    ),
    "BERT": Model(
        "BertForMaskedLM",
        "hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, "
        "max_position_embeddings=64",
        "expand{ffn=2x}",
        TEXT,
    ),
    "T5": Model(
        "T5ForConditionalGeneration",
        "d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64",
        "expand{ffn=+6 heads=+1 layers=+1}",
        f"{TEXT}, decoder_input_ids=torch.randint(3, 60, (2, 7))",
    ),
    "ResNet": Model(
        "ResNetForImageClassification",
        "embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic', num_labels=5",
        "expand{method=net2net channels=2x}",
        "pixel_values=torch.randn(2, 3, 32, 32)",
    ),
    "ViT (timm)": Model("timm", "test_vit", "expand{ffn=2x layers=+1}", "x=torch.randn(2, 3, 160, 160)"),
}

ALONE = """
import importlib.util, json, sys
sys.path[:0] = json.loads({paths!r})
assert importlib.util.find_spec("rewrite") is None, "this package can be imported here"
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.manual_seed(0)
"""
BUILD = """
import transformers
kind = getattr(transformers, {kind!r})
config = kind.config_class({sizes}, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0)
kind(config).save_pretrained("small")
"""
BUILD_TIMM = """
import timm
from safetensors.torch import save_model
save_model(timm.create_model({sizes!r}), "small.safetensors")
"""
LOAD = """
from transformers import {kind} as A
small, large = A.from_pretrained("small"), A.from_pretrained("large")
"""
LOAD_TIMM = """
import timm
from safetensors.torch import load_model
names, small = {{}}, timm.create_model({sizes!r})
exec(json.load(open("large/rewrite.json"))["python"], names)
load_model(small, "small.safetensors")
large = names["model"]
"""
TRY = """
torch.manual_seed(1)
inputs = dict({inputs})
def first(value):
    return value if isinstance(value, torch.Tensor) else value[0]
found = []
for model in (small, large):
    with torch.no_grad():
        found.append(first(model.eval()(**inputs)))
said = {{"difference": float((found[0] - found[1]).abs().max() / found[0].abs().max())}}
said["parameters"] = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
if getattr(large, "can_generate", lambda: False)():
    made = [m.generate(inputs["input_ids"][:1], max_new_tokens=12, do_sample=False, use_cache=True) for m in (small, large)]
    said["generates"] = torch.equal(*made)
optimizer = torch.optim.AdamW(large.train().parameters(), lr=1e-3)
losses = []
target = torch.randn_like(found[1])
for _ in range(2):
    optimizer.zero_grad()
    torch.manual_seed(0)
    loss = (first(large(**inputs)) - target).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
said["losses"] = losses
print(json.dumps(said))
"""


def main() -> None:
    names = sys.argv[1:] or list(MODELS)
    torch_version, python = torch.__version__, platform.python_version()
    print(f"torch {torch_version}, Python {python}, one thread, {time.strftime('%Y-%m-%d')}\n")
    print("| model | grown by | parameters | written | outputs differ by | greedy with a cache | loss, a step later |")
    print("| --- | --- | ---: | --- | ---: | --- | --- |")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, MODELS[name], Path(folder)), flush=True)


def row(name: str, model: Model, folder: Path) -> str:
    """Build, grow and read one model back: its line of the table."""
    timm, paths = model.kind == "timm", json.dumps(linked(folder / "libraries"))
    alone(ALONE + (BUILD_TIMM if timm else BUILD), model, paths, folder)
    source = [f"timm:{model.sizes}", "--weights", "small.safetensors"] if timm else ["small"]
    said = python(["-m", "rewrite", "apply", *source, "-p", model.step, "-o", "large"], folder)
    found = json.loads(alone(ALONE + (LOAD_TIMM if timm else LOAD) + TRY, model, paths, folder).strip().splitlines()[-1])
    small, large = found["parameters"]
    greedy = {True: "equal", False: "NOT EQUAL", None: ""}[found.get("generates")]
    before, after = found["losses"]
    written = said.strip().splitlines()[-1].partition(": ")[2].partition(",")[0].partition(";")[0]
    cells = [f"`{model.step}`", f"{small:,} to {large:,}", written, f"{found['difference']:.0e}", greedy]
    return f"| {name} | {' | '.join(cells)} | {before:.4f}, {after:.4f} |"


def alone(code: str, model: Model, paths: str, folder: Path) -> str:
    """What a process without this package prints."""
    return python(["-S", "-c", code.format(paths=paths, **vars(model))], folder)


def linked(folder: Path) -> list[str]:
    """A folder with all that is installed but this package, and the standard library's own."""
    folder.mkdir()
    for place in map(Path, sys.path):
        if place.name == "site-packages":
            for entry in place.iterdir():
                link = folder / entry.name
                if "rewrite" not in entry.name and entry.suffix != ".pth" and not link.exists():
                    link.symlink_to(entry)
    return [str(folder)]


def python(arguments: Sequence[str], folder: Path) -> str:
    """What a new process prints."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=given)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)[:300]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
