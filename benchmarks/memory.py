"""What passes of the family memory save and cost in training, beside checkpointing and the compiler.

    python benchmarks/memory.py [--models vit,gnn,...] [--dtypes float32,bfloat16] [--passes few-bit,...] [--no-compile]

    python benchmarks/memory.py --models vit-s,resnet-50,bert-base,gpt2-124m,llama-stack     # in full size: hours

One thread, random weights, two blocks (or a ResNet-18 and an atto ConvNeXt on small images, and a graph network of messages
by index_add), no dropout. A step is one forward and the gradient of all parameters, the median CPU time of three. Error
(relative, root mean square) and cosine are those of the gradients of the parameters that both models have, for a random
projection of the outputs, against eager in the same dtype. What a compiler takes part in stands compiled too, with all that
it would keep and with half of it. `--no-ways` leaves all baselines but eager out.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import rewrite
from rewrite.proof.estimate import nearness
from rewrite.torch_private import pytree
from rewrite.training.baselines import BUDGET, Way, compared, way_of
from tests.models.zoo import import_timm

import_timm()  # before transformers, which asks for torchvision too
import transformers  # noqa: E402

WIDTH, HEADS, LAYERS, TOKENS, BATCH = 128, 4, 2, 128, 4
CHEAP = "recompute{where='re:norm|ln_|LayerNorm|act'}"
PIPELINES = [
    "few-bit",
    "few-bit{method=approx-bp}",
    "share-norm",
    CHEAP,
    "recompute",
    "compress-activations",
    "compress-activations{groups=heads}",
    "compress-activations{format=fp8 group=16}",
    "compress-activations{bits=4}",
    "compress-activations{bits=auto average=4}",
    "randomized-linear",
    "velora",
    f"{CHEAP},compress-activations",
    "share-norm,few-bit,compress-activations",
    f"share-norm,{CHEAP},compress-activations",
    "recompute,compress-activations",
    "recompute,compress-activations{bits=4}",
    "fit-memory{budget=0.5}",
    "fit-memory{budget=0.25}",
    "fit-memory{budget=0.1}",
]
COMPILED = ("compress-activations", "compress-activations{bits=4}")
FULL = ("vit-s", "resnet-50", "bert-base", "gpt2-124m", "llama-stack")
"""In the sizes that papers report, but for the Llama: four blocks of width 1024."""
MODELS = ("vit", "bert", "gpt2", "llama", "opt", "resnet", "convnext", "gnn")


class GraphNetwork(nn.Module):
    """Message passing: h_i + up(act(down(norm(Σ_{j → i} act(message([h_j, h_i])))))), two rounds on one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.rounds = nn.ModuleList(Round() for _ in range(LAYERS))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        h = self.embed(nodes)
        for each in self.rounds:
            h = each(h, edges)
        found: Tensor = self.head(h)
        return found


class Round(nn.Module):
    """One round of messages along edges [2, count], source and target."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.act = nn.Linear(2 * WIDTH, WIDTH), nn.SiLU()
        self.norm, self.down, self.act2, self.up = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        sent = self.act(self.message(torch.cat([h[edges[0]], h[edges[1]]], -1)))
        summed = torch.zeros_like(h).index_add(0, edges[1], sent)
        found: Tensor = h + self.up(self.act2(self.down(self.norm(summed))))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--passes", help="pipelines whose text has one of these, instead of all")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-ways", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {time.strftime('%Y-%m-%d')}")
    print(f"small models: width {WIDTH}, {LAYERS} blocks, {BATCH} x {TOKENS}")
    for name in options.models.split(","):
        for dtype in options.dtypes.split(","):
            wanted = (options.passes or "").split(",")
            chosen = [text for text in PIPELINES if any(part in text for part in wanted)]
            table(name, getattr(torch, dtype), chosen, compiled=not options.no_compile, ways=not options.no_ways)


def table(name: str, dtype: torch.dtype, pipelines: Sequence[str], *, compiled: bool, ways: bool = True) -> None:
    """A row for each baseline and each pipeline."""
    model, inputs = made(name)
    model = model.to(dtype).eval()
    inputs = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    program = rewrite.capture(model, (), inputs)
    columns = ("", "kept, KiB", "times less", "peak, KiB", "ms", "error", "cosine")
    print(f"\n### {name}, {dtype}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rows = compared(program, compiled=compiled, clock=time.process_time).rows if ways else (_eager(program),)
    exact = gradients(program.module, inputs)
    for way in rows:
        print(row(way.name, way, rows[0], ""), flush=True)
    for text in pipelines:
        try:
            after = rewrite.apply(program, text, data=[inputs], verify=False)
        except rewrite.RewriteError as error:
            print(f"| `{text}` | {str(error)[:90]} | | | | | |", flush=True)
            continue
        if not any(record.changed for record in after.history):
            continue
        print(
            row(
                f"`{text}`",
                way_of(text, after, clock=time.process_time),
                rows[0],
                near(exact, gradients(after.module, inputs)),
            ),
            flush=True,
        )
        if compiled and text in COMPILED:
            for budget in (1.0, BUDGET):
                title = f"`{text}`, torch.compile" + f", budget {budget}" * (budget < 1)
                print(row(title, way_of(title, after, budget, clock=time.process_time), rows[0], ""), flush=True)


def _eager(program: rewrite.Program) -> Way:
    return way_of("eager", program, clock=time.process_time)


def row(name: str, way: Way, eager: Way, near: str) -> str:
    if way.problem:
        return f"| {name} | {way.problem[:80]} | | | | | |"
    kept = f"{way.bytes / 1024:,.0f} | {eager.bytes / max(way.bytes, 1):.2f} | {way.peak / 1024:,.0f}"
    return f"| {name.replace('|', chr(92) + '|')} | {kept} | {1e3 * way.seconds:.0f} | {near or ' | '} |"


def gradients(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """By name, of a random projection of all outputs, in training."""
    module.train()
    torch.manual_seed(0)
    outputs = [t for t in pytree.tree_leaves(module(**inputs)) if isinstance(t, Tensor) and t.requires_grad]
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    own = torch.Generator().manual_seed(0)
    loss = torch.stack([(t.float() * torch.randn(t.shape, generator=own)).sum() for t in outputs]).sum()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def near(exact: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    shared = [n for n in exact if n in got and got[n].shape == exact[n].shape]
    error, cosine = nearness(*(torch.cat([g[n].flatten().double() for n in shared]) for g in (exact, got)))
    return f"{error:.1e} | {cosine:.4f}"


def full(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in full size, and inputs: four images of 224 x 224, or four times 128 tokens."""
    if name in ("vit-s", "resnet-50"):
        kind = {"vit-s": "vit_small_patch16_224", "resnet-50": "resnet50"}[name]
        return import_timm().create_model(kind), {"x": torch.randn(BATCH, 3, 224, 224)}
    model: Any
    if name == "bert-base":
        config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.BertModel(config)
    elif name == "gpt2-124m":
        model = transformers.GPT2Model(
            transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        )
    else:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=2000, use_cache=False))
    return model, {"input_ids": torch.randint(5, 2000, (BATCH, TOKENS))}


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights, and inputs."""
    torch.manual_seed(0)
    if name in FULL:
        return full(name)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokens = {"input_ids": torch.randint(5, 500, (BATCH, TOKENS))}
    model: Any
    if name == "vit":
        config = transformers.ViTConfig(**sizes, **quiet, image_size=176, patch_size=16)
        model, inputs = transformers.ViTModel(config), {"pixel_values": torch.randn(BATCH, 3, 176, 176)}
    elif name == "bert":
        model, inputs = transformers.BertModel(transformers.BertConfig(**sizes, **quiet, vocab_size=500)), tokens
    elif name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=500, n_positions=TOKENS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model, inputs = transformers.GPT2Model(config), tokens
    elif name == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=HEADS, vocab_size=500))
        inputs = tokens
    elif name == "opt":
        own = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": 4 * WIDTH}
        config = transformers.OPTConfig(**own, word_embed_proj_dim=WIDTH, vocab_size=500, dropout=0.0, attention_dropout=0.0)
        model, inputs = transformers.OPTModel(config), tokens
    elif name == "gnn":
        model = GraphNetwork()
        inputs = {"nodes": torch.randn(BATCH * TOKENS, 16), "edges": torch.randint(BATCH * TOKENS, (2, 4 * BATCH * TOKENS))}
    else:
        kind = {"resnet": "resnet18", "convnext": "convnext_atto"}[name]
        model, inputs = import_timm().create_model(kind, num_classes=10), {"x": torch.randn(BATCH, 3, 96, 96)}
    if re.search("gpt2|llama|opt", name):
        model.config.use_cache = False
    return model, inputs


if __name__ == "__main__":
    main()
