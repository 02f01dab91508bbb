"""What torch.export.save writes of thirty models of both libraries: read, the same function, passes applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import rewrite
from rewrite.analysis.norms import norms
from rewrite.graph.export import quiet
from rewrite.passes.normalization.dyt import DyT
from tests.models import zoo
from tests.rewrite.cli.running import run

TIMM = {
    "test_byobnet": 64,
    "test_convnext": 64,
    "test_efficientnet": 64,
    "test_mambaout": 64,
    "test_nfnet": 64,
    "test_resnet": 64,
    "test_vit": 160,
    "test_vit3": 160,
}
TRANSFORMERS = (
    *("gpt2", "opt", "llama", "gemma2", "qwen3", "gpt_neox", "bloom", "phi3", "mamba", "olmo2", "cohere"),
    *("bert", "distilbert", "albert", "electra", "modernbert", "mpnet", "deberta-v2"),
    *("t5", "bart"),
    *("vit", "beit", "convnext", "segformer", "resnet"),
)
CASES = {
    case.name: case for case in [*(zoo.timm_case(n, s) for n, s in TIMM.items()), *map(zoo.transformers_case, TRANSFORMERS)]
}


def exported(name: str, path: Path) -> tuple[list[torch.Tensor], Any]:
    """Save a model's export in evaluation, as a user without this package does: what it gives, and its inputs."""
    case = CASES[name]
    model = case.build().eval()
    args, kwargs = case.inputs(2, 12)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # a cache is no output of an export
    with quiet(), torch.no_grad():
        torch.export.save(torch.export.export(model, args, kwargs, strict=False), path)
        expected = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    return expected, (args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_read_and_rewritten(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    expected, (args, kwargs) = exported(name, path)
    program = rewrite.load(path)
    with torch.no_grad():
        found = [t for t in pytree.tree_leaves(program.module.eval()(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    result = rewrite.apply(program, [DyT()], verify=False, share=True)
    assert result.history[0].changed == bool(norms(program))
    assert "an exported program" in run("show", path).stdout
