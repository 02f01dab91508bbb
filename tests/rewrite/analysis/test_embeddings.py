"""Embeddings with the scale and the offset that their modules add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.analysis.embeddings import embeddings
from tests.captures import capture, shared
from tests.models import zoo


class Scaled(nn.Embedding):
    """3 · W[i + 2]; the product is used once more where ``again``."""

    def __init__(self, again: bool = False) -> None:
        super().__init__(12, 4)
        self.again = again

    def forward(self, ids: Tensor) -> Tensor:
        found = super().forward(ids + 2)
        return found * 3 + found if self.again else found * 3


@pytest.mark.parametrize("again", [False, True])
def test_scale_and_offset(again: bool) -> None:
    (found,) = embeddings(capture(nn.Sequential(Scaled(again)), (torch.randint(0, 10, (2, 5)),)))
    assert (found.path, found.weight_path, found.rows, found.width, found.offset) == ("0", "0.weight", 12, 4, 2)
    assert found.scale == (1.0 if again else 3.0)
    assert (found.value is found.node) == again


def test_gpt2() -> None:
    assert [(e.path, e.scale, e.offset, e.value is e.node) for e in embeddings(shared("gpt2"))] == [
        ("wte", 1.0, 0, True),
        ("wpe", 1.0, 0, True),
    ]


EXPECTED = {
    "gemma": [("embed_tokens", 32**0.5, "embed_tokens.embed_scale", 0)],
    "bart": [
        ("encoder.embed_tokens", 1.0, None, 0),
        ("encoder.embed_positions", 1.0, None, 2),
        ("decoder.embed_tokens", 1.0, None, 0),
        ("decoder.embed_positions", 1.0, None, 2),
    ],
    "opt": [("decoder.embed_tokens", 1.0, None, 0), ("decoder.embed_positions", 1.0, None, 2)],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_transformers(kind: str) -> None:
    case = zoo.transformers_case(kind)
    model = case.build()
    if {path for _, _, path, _ in EXPECTED[kind] if path} - {name for name, _ in model.named_buffers()}:
        pytest.skip("this version of transformers scales outside of the embedding's module")  # Gemma of 5.0.0
    found = embeddings(capture(model, *case.inputs(2, 12)))
    assert [(e.path, e.scale_path, e.offset) for e in found] == [(p, path, offset) for p, _, path, offset in EXPECTED[kind]]
    assert [e.scale for e in found] == pytest.approx([scale for _, scale, _, _ in EXPECTED[kind]])
