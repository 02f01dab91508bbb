"""A norm at the end of each branch as well (Peri-LN)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from rewrite.analysis.observe import observe
from rewrite.errors import RewriteError
from rewrite.pipeline.inserting import insert_behind
from rewrite.pipeline.norm_formulas import norm_formula
from rewrite.pipeline.outer_norms import has_last, norm_for
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.placing import Placing, Surroundings
from rewrite.proof.contract import NEW, Contract

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class PeriLN(Placing):
    """Normalize what each pre-norm branch adds as well: x + F(N x) becomes x + N_out(F(N x)).

    N_out is a LayerNorm, or an RMSNorm where the branch begins with one, with that one's eps. Its weight starts at 1, as in
    the paper; with data and ``calibrate=rms`` at the root mean square of what the branch adds, so that a trained model's
    sums keep their size. Either way it is another function: tokens whose branch is small are brought to the same size.

    Left alone, with the reason: branches that do not begin with a norm, or end in one already, that are scaled behind
    (LayerScale), and those whose channels are not the last axis.

    Source: Kim et al., "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture", ICML 2025
    (arXiv 2502.02732), section 3; the norms of the embedding and of the output are not added.
    """

    name = "peri-ln"
    calibrate: Literal["none", "rms"] = option("none", "weight of the new norms: none: 1, rms: what branches add on data")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        if branch.order != "pre":
            return f"it is {branch.order}-norm, not pre-norm"
        if branch.scale is not None:
            return "what it adds is scaled behind it"
        return "" if has_last(branch.output, branch.stream.size) else "its channels are not the last axis"

    def place_all(self, ready: Sequence[Branch], around: Surroundings, context: Context) -> None:
        gains = [1.0] * len(ready)
        if self.calibrate == "rms" and ready:
            if context.data is None:
                raise RewriteError("peri-ln{calibrate=rms} needs data: apply(..., data=...) or --data FILE")
            outputs = [branch.output for branch in ready]
            found = observe(around.program, outputs, context.data, progress=context.progress, seed=context.seed)
            gains = [float(found[output].rms) for output in outputs]
        for branch, gain in zip(ready, gains, strict=True):
            norm = norm_for(around.program, branch, branch.output, gain)
            made = insert_behind(context.edit, branch.output, "norm", norm)
            if self.calibrate == "rms":
                context.measure(str(made.target), rms=gain)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The norm, written out."""
        return norm_formula(new, inputs[0])
