"""How far what a rewritten model gives is from what the original gives: on outputs and on values inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812

from rewrite.errors import RewriteError
from rewrite.graph.program import Program

LossName = Literal["auto", "kl", "mse"]


class OutputLoss:
    """The distance of two models' outputs, the mean over all floating ones.

    ``kl``: mean over positions of Σ_c p_c (log p_c - log q_c), p and q the softmax over the last axis of the original's
    output and the new one. ``mse``: Σ (y - t)² / Σ (t - mean t)². ``auto`` is ``kl`` for an output field called ``logits``
    (the others are left aside then), ``mse`` otherwise.

    Raises RewriteError where no output is floating, or the outputs of the two programs differ in number or shape.
    """

    def __init__(self, name: LossName, program: Program, outputs: Sequence[Any]) -> None:
        fields = program.module.interface.leave(outputs, training=False)
        logits = getattr(fields, "logits", None)
        self.name = name if name != "auto" else "mse" if logits is None else "kl"
        floating = [i for i, value in enumerate(outputs) if isinstance(value, torch.Tensor) and value.is_floating_point()]
        self.places = [i for i in floating if outputs[i] is logits] if name == "auto" and logits is not None else floating
        if not self.places:
            raise RewriteError("the model gives no floating tensor to learn from")

    def __call__(self, made: Sequence[Any], wanted: Sequence[Any]) -> torch.Tensor:
        if len(made) != len(wanted) or any(made[i].shape != wanted[i].shape for i in self.places):
            raise RewriteError("the two models' outputs differ in number or shape: they cannot learn from one another")
        distance = divergence if self.name == "kl" else relative
        return torch.stack([distance(made[i], wanted[i]) for i in self.places]).mean()


def divergence(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean over positions of KL(softmax(wanted) | softmax(made)), in nats."""
    classes = made.shape[-1]
    log_q, log_p = (F.log_softmax(v.float(), -1).reshape(-1, classes) for v in (made, wanted))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def relative(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Σ (made - wanted)² / Σ (wanted - mean)²: 1 for what tells nothing but the mean."""
    target = wanted.float()
    spread = (target - target.mean()).square().mean().clamp_min(1e-12)
    return (made.float() - target).square().mean() / spread


def hidden_loss(made: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of ``relative`` over values that correspond."""
    return torch.stack([relative(a, b) for a, b in zip(made, wanted, strict=True)]).mean()
