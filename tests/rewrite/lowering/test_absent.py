"""Where a pass took a module out, the user's class calls something that stands for it, or the copy is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.lowering.absent import Zeros
from rewrite.lowering.standing import Standing
from tests.passes.table import subject

X = torch.randn(4, 8)


def grafted(model: str, step: str) -> nn.Module:
    """The model's own class after a pass; graft compares it with the program, in both modes, gradients too."""
    whole = subject(model).model
    assert whole is not None
    made = rewrite.graft(rewrite.apply(subject(model).program, step, verify=False), whole)
    assert type(made) is type(whole)
    return made


@pytest.mark.parametrize(
    ("model", "step", "path", "kind"),
    [
        ("resnet18", "fold-batchnorm", "bn1", nn.Identity),
        ("gpt2", "power-norm,merge-norms", "h.0.ln_1", nn.Identity),
        ("gpt2", "drop-ffn{layers=1}", "h.1.mlp", Zeros),
        ("gpt2", "drop-attention{layers=1}", "h.1.attn", Standing),
        ("t5", "drop-ffn{layers=1}", "encoder.block.1.layer.1", nn.Identity),
        ("bert", "drop-attention{layers=0}", "encoder.layer.0.attention.self", Standing),
        ("llama", "drop-blocks{layers=1}", "layers.1", Standing),
        ("vit_tiny_patch16_224", "drop-blocks{layers=0}", "blocks.0", nn.Identity),
        ("resnet18", "drop-blocks{layers=1}", "layer1.1.conv2", Zeros),
        ("PreNormDecoder", "drop-ffn{layers=1}", "layers.1.down", Zeros),
    ],
)
def test_what_stands_for_it(model: str, step: str, path: str, kind: type[nn.Module]) -> None:
    assert type(grafted(model, step).get_submodule(path)) is kind


def test_a_norm_with_an_activation_of_its_own_leaves_that() -> None:
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("efficientnet_b0", num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    made = rewrite.transform(model, "fold-batchnorm", args=(x,))
    assert [type(part).__name__ for part in made.bn1.children()] == ["Identity", "SiLU"]
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-9)  # outputs of 1e-4, 7e-11 apart


@pytest.mark.parametrize("step", ["drop-attention{layers=0}", "drop-blocks{layers=0}"])
def test_a_cache_that_the_first_layer_counts_is_tried(step: str) -> None:
    with pytest.raises(rewrite.RewriteError, match=r"your class needs what the passes took out: with a cache it is .* off"):
        grafted("gpt2", step)


class Turned(nn.Module):
    """A branch whose module gives another form than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.branch = nn.Linear(8, 8), nn.LayerNorm(8), Transposed()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        found: Tensor = h + self.branch(self.norm(h).t())
        return found


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(x.t()).relu())
        return found


def test_what_nothing_can_stand_for_is_refused_by_name() -> None:
    program = rewrite.apply(Turned(), "drop-ffn{layers=0}", args=(X,), verify=False)
    assert program.history[-1].changed
    with pytest.raises(rewrite.RewriteError, match="nothing that branch is called with has the tokens of what it gives"):
        rewrite.graft(program, Turned())


def test_without_verify_it_is_compared_all_the_same() -> None:
    program = rewrite.apply(subject("gpt2").program, "drop-blocks{layers=0}", verify=False)
    whole = subject("gpt2").model
    assert whole is not None
    with pytest.raises(rewrite.RewriteError, match="your class needs what the passes took out"):
        rewrite.graft(program, whole, verify=False)
