"""A character GPT trained on the standard library's own sources: one to two minutes on one CPU core.

    python examples/char_gpt.py [--steps N] [-o char_gpt.pt]

The functions are pure: they draw from the seed that they are given and leave no state behind.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

CONTEXT = 64
#: Every character of the text is one of these; anything else is read as the last one.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\ufffd"


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharGPT(nn.Module):
    """A pre-norm GPT: character ids [batch, length <= context] -> logits [batch, length, characters]."""

    def __init__(
        self,
        characters: int = len(ALPHABET),
        context: int = CONTEXT,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        self.apply(_initialize)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _initialize(module: nn.Module) -> None:
    """Linear layers start small; embeddings with deviation 1, so that the stream has the scale at which tanh bends."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.05)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_model(seed: int = 0) -> CharGPT:
    """A fresh model whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CharGPT()


@dataclass(frozen=True)
class Corpus:
    """Character ids of the text to learn from and of the text held back."""

    train: Tensor
    validation: Tensor


@cache
def corpus() -> Corpus:
    """The modules of the standard library; every tenth one, by name, is held back."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [encode(file.read_text(encoding="utf-8", errors="replace")) for file in files]
    held = [text for index, text in enumerate(texts) if index % 10 == 5]
    kept = [text for index, text in enumerate(texts) if index % 10 != 5]
    return Corpus(torch.cat(kept), torch.cat(held))


def encode(text: str) -> Tensor:
    """Ids of the characters of a text, as one vector."""
    other = len(ALPHABET) - 1
    index = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([index.get(character, other) for character in text], dtype=torch.long)


def decode(ids: Tensor) -> str:
    """The text of a vector of ids."""
    return "".join(ALPHABET[i] for i in ids.tolist())


def windows(text: Tensor, count: int, generator: torch.Generator, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """`count` random stretches of a text and the same ones a character later: ids and targets [count, context]."""
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    stretches = text[starts + torch.arange(context + 1)]
    return stretches[:, :-1], stretches[:, 1:]


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy per character, in nats."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then a half cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(
    model: nn.Module,
    steps: int,
    seed: int = 0,
    lr: float = 3e-3,
    batch: int = 16,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train in place with AdamW and return the loss of each step; the seed chooses the batches, ``tell`` hears of each."""
    text = corpus().train
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        ids, targets = windows(text, batch, generator)
        loss = loss_of(model, ids.to(device), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tell(step + 1, losses[-1])
    return losses


@torch.no_grad()
def validation_loss(model: nn.Module, batches: int = 8, batch: int = 64) -> float:
    """Loss on text held back, always on the same stretches of it; the mode of the model is kept."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    pairs = [windows(corpus().validation, batch, generator) for _ in range(batches)]
    losses = [loss_of(model, ids.to(device), targets.to(device)).item() for ids, targets in pairs]
    model.train(training)
    return sum(losses) / batches


@torch.no_grad()
def sample(model: nn.Module, prompt: str, characters: int = 200, seed: int = 0) -> str:
    """The prompt continued, a character at a time."""
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    ids = encode(prompt)[None]
    for _ in range(characters):
        probabilities = model(ids[:, -CONTEXT:])[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)), 1)
    model.train(training)
    return decode(ids[0])


def _print_every(steps: int) -> Callable[[int, float], None]:
    def tell(step: int, loss: float) -> None:
        if step % steps == 0:
            print(f"step {step}, loss {loss:.3f}", flush=True)

    return tell


def main() -> None:
    """Train, print the losses and a sample, and save the model if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the trained module here with torch.save")
    options = parser.parse_args()
    model = make_model(options.seed)
    start = time.perf_counter()
    losses = train(model, options.steps, options.seed, tell=_print_every(100))
    seconds = time.perf_counter() - start
    print(f"{options.steps} steps in {seconds:.0f} s, training loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    print(f"validation loss {validation_loss(model):.3f}")
    print(sample(model, "def "))
    if options.output:
        torch.save(model, options.output)


if __name__ == "__main__":
    # A pickle names the module of each class, and `__main__` would be this script only while it runs.
    from char_gpt import main as run

    run()
