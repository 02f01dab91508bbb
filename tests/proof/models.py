"""The model that wrong and right passes are tried on: small, and with a place for each kind of mistake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import Program
from tests.captures import capture

WORDS, DIM = 12, 8


class Block(nn.Module):
    """x + second(dropout(act(first(norm(x)))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.first = nn.Linear(DIM, 2 * DIM)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(0.25)
        self.second = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(self.act(self.first(self.norm(x)))))


class Model(nn.Module):
    """ids [batch, length], mask [batch, length] -> [batch, WORDS]: embedding, two blocks, masked mean, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(DIM)
        self.head = nn.Linear(DIM, WORDS)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        weights = mask.to(x.dtype).unsqueeze(-1)
        mean = (x * weights).sum(1) / weights.sum(1)
        return self.head(self.batch_norm(mean))


def model() -> Model:
    """A fresh model, the same each time; no parameter of it is all ones or zeros."""
    torch.manual_seed(0)
    made = Model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def program() -> Program:
    """The model captured on five sequences of six words whose masks are ones."""
    torch.manual_seed(1)
    return capture(model(), (torch.randint(1, WORDS, (5, 6)), torch.ones(5, 6, dtype=torch.long)))
