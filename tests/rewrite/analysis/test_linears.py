"""Linear maps of a program, however they are spelled: what each is made of, who reads what, and what stays unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program, apply
from rewrite.analysis.linears import Linear, Readers, Rows, linears
from rewrite.analysis.unseen import unseen, unseen_text
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import attribute
from tests.captures import capture, shared
from tests.models import zoo

DIM = 8


class Block(nn.Module):
    """A norm before one of ``FORMS``, and a residual addition."""

    def __init__(self, form: str, *, rms: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(DIM) if rms else nn.LayerNorm(DIM)
        for name, value in {"w": (24, DIM), "flat": (DIM, DIM), "q": (DIM,), "v": (DIM,), "b": (24,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*value)))
        self.register_buffer("zero", torch.zeros(DIM))
        self.inner, self.form = nn.MultiheadAttention(DIM, 2, batch_first=True), form
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.copy_(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + FORMS[self.form](self, n, x).unflatten(-1, (-1, DIM)).sum(-2)


def mixed(b: Any, n: Tensor, x: Tensor) -> Tensor:
    query, rest = b.w.split([DIM, 2 * DIM])
    return torch.cat([F.linear(n, query, b.b[:DIM]), F.linear(x, rest, b.b[DIM:])], -1)


FORMS: dict[str, Any] = {
    "free": lambda b, n, x: F.linear(n, b.w, b.b),
    "concatenated": lambda b, n, x: F.linear(n, b.w, torch.cat([b.q, b.zero, b.v])),
    "zeros": lambda b, n, x: F.linear(n, b.w, torch.cat([b.q, torch.zeros_like(b.v, requires_grad=False), b.v])),
    "mixed": mixed,
    "chunks": lambda b, n, x: F.linear(n, b.w.chunk(3)[1], b.b.chunk(3)[1]),
    "overlapping": lambda b, n, x: F.linear(n, b.w[:DIM]) + F.linear(x, b.w[4 : 4 + DIM]),
    "self attention": lambda b, n, x: b.inner(n, n, n, need_weights=False)[0],
    "cross attention": lambda b, n, x: b.inner(n, x, x, need_weights=False)[0],
    "transposed": lambda b, n, x: F.linear(n, b.flat.t()),
    "product": lambda b, n, x: n @ b.flat,
}


def program_of(form: str, *, rms: bool = False) -> Program:
    return capture(Block(form, rms=rms), (torch.randn(2, 5, DIM),))


def value(program: Program, linear: Linear, x: Tensor) -> Tensor:
    """x Wᵀ + b with W and b put together as the record says."""

    def whole(parts: tuple[Rows, ...]) -> Tensor:
        tensors = [attribute(program.module, p.path) if p.path else torch.zeros(p.stop) for p in parts]
        turned = [t.t() if linear.layout == "in_out" and t.dim() == 2 else t for t in tensors]
        return torch.cat([t[p.start : p.stop] for t, p in zip(turned, parts, strict=True)])

    y = x @ whole(linear.weight).t()
    return y + whole(linear.bias) if linear.bias else y


EXPECTED = {
    "free": [("w:0-24", "b:0-24")],
    "concatenated": [("w:0-24", "q:0-8 zero:0-8 v:0-8")],
    "zeros": [("w:0-24", "q:0-8 :0-8 v:0-8")],
    "mixed": [("w:0-8", "b:0-8"), ("w:8-24", "b:8-24")],
    "chunks": [("w:8-16", "b:8-16")],
    "overlapping": [("w:0-8", ""), ("w:4-12", "")],
    "self attention": [
        ("inner.in_proj_weight:0-24", "inner.in_proj_bias:0-24"),
        ("inner.out_proj.weight:0-8", "inner.out_proj.bias:0-8"),
    ],
    "cross attention": [
        ("inner.in_proj_weight:0-8", "inner.in_proj_bias:0-8"),
        ("inner.in_proj_weight:8-24", "inner.in_proj_bias:8-24"),
        ("inner.out_proj.weight:0-8", "inner.out_proj.bias:0-8"),
    ],
    "transposed": [],
    "product": [],
}


@pytest.mark.parametrize("form", FORMS)
def test_what_each_is_made_of(form: str) -> None:
    def text(parts: tuple[Rows, ...]) -> str:
        return " ".join(f"{p.path}:{p.start}-{p.stop}" for p in parts)

    assert [(text(found.weight), text(found.bias)) for found in linears(program_of(form))] == EXPECTED[form]


@pytest.mark.parametrize("form", [form for form, found in EXPECTED.items() if found])
def test_the_record_says_what_the_node_computes(form: str) -> None:
    program = program_of(form)
    seen: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Watch(program.module.eval(), graph=program.graph).run(torch.randn(3, 5, DIM))
        for found in linears(program):
            torch.testing.assert_close(seen[found.node.name], value(program, found, seen[found.source.name]))


def test_who_reads_what_of_a_tensor() -> None:
    readers = Readers(program_of("overlapping"))
    assert len(readers.of(Rows("w", 0, 4))) == 1
    assert len(readers.of(Rows("w", 4, 8))) == 2
    assert len(readers.of(Rows("w", 20, 24))) == 0


FOLDS = {
    "free": ["b", "w", "norm"],
    "mixed": ["b", "w", "norm"],
    "chunks": ["b", "w", "norm"],
    "self attention": ["inner.in_proj_bias", "inner.in_proj_weight", "norm"],
    "cross attention": ["inner.in_proj_bias", "inner.in_proj_weight", "norm"],
}
LEFT = {
    "concatenated": "has zero in its bias, which is no parameter",
    "zeros": "has a constant in its bias, which is no parameter",
    "overlapping": "linear, which reads it, shares w with linear_1",
    "transposed": "linear reads it, which is no linear layer",
    "product": "matmul reads it, which is no linear layer",
}


@pytest.mark.parametrize("form", FOLDS)
def test_a_norm_is_folded_into_part_of_a_parameter(form: str) -> None:
    record = apply(program_of(form), "fold-affine").history[-1]
    assert [site.path for site in record.changes] == FOLDS[form]
    assert not record.skipped


@pytest.mark.parametrize("form", LEFT)
def test_a_norm_is_left_alone_for_a_reason(form: str) -> None:
    record = apply(program_of(form), "fold-affine").history[-1]
    assert not record.changes
    assert LEFT[form] in record.skipped[0].reason


def test_without_a_bias_of_the_norm_a_concatenated_one_does_not_matter() -> None:
    record = apply(program_of("concatenated", rms=True), "fold-affine").history[-1]
    assert [site.path for site in record.changes] == ["w", "norm"]


@pytest.mark.parametrize(("form", "text"), [("transposed", "linear of flat"), ("product", "matmul of flat")])
def test_what_is_no_layer_is_named(form: str, text: str) -> None:
    program = program_of(form)
    assert [str(each) for each in unseen(program, "linear")] == [text]
    assert unseen_text(program, "linear") == f"left alone, since computed outside of any layer: {text}"
    assert apply(program, "random-prune", verify=False).history[-1].warnings == (unseen_text(program, "linear"),)


def test_what_is_seen_is_not_named() -> None:
    assert unseen_text(program_of("mixed"), "linear", "convolution", "norm", "embedding") is None


def test_a_mask_needs_a_layer() -> None:
    record = apply(program_of("self attention"), "random-prune", verify=False).history[-1]
    assert [site.path for site in record.changes] == ["inner.out_proj"]
    assert [(s.path, s.reason) for s in record.skipped] == [
        ("inner", "it multiplies with inner.in_proj_weight in its own code: there is no layer to mask")
    ]


def test_norms_of_free_parameters_are_named() -> None:
    (warning,) = apply(shared("FunctionalLayerNorm"), "dyt", verify=False, share=True).history[-1].warnings
    assert warning.count("layer_norm of") == 2


# -------------------- small models, random weights, one of each spelling ------------------------------------------


def test_gpt2_is_made_of_linear_layers() -> None:
    found = linears(shared("gpt2"))
    assert [linear.path for linear in found[:4]] == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    assert all(isinstance(linear.layer, TransposedLinear) for linear in found)
    assert {linear.types for linear in found} == {("Linear", "TransposedLinear", "Conv1D")}
    assert unseen_text(shared("gpt2"), "linear", "norm", "embedding") is None


@pytest.mark.parametrize(("kind", "count"), [("opt", 12), ("beit", 12)])
def test_transformers(kind: str, count: int) -> None:
    case = zoo.transformers_case(kind)
    program = capture(case.build(), *case.inputs(2, 12))
    assert len(linears(program)) == count
    assert all(linear.layer is not None for linear in linears(program))


def test_timm_beit_concatenates_its_biases() -> None:
    timm = zoo.import_timm()
    options = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 16, "num_classes": 3}
    program = capture(timm.create_model("beit_base_patch16_224", **options), (torch.randn(2, 3, 32, 32),))
    found = linears(program)
    assert len(found) == 9
    qkv = [linear for linear in found if linear.layer is None]
    assert [linear.weight[0].path for linear in qkv] == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    assert [rows.path.rpartition(".")[2] for rows in qkv[0].bias] == ["q_bias", "k_bias", "v_bias"]
    record = apply(program, "fold-affine").history[-1]
    assert len(record.changes) == 9, "the norms before both FFNs and the head"
    assert "has blocks.0.attn.k_bias in its bias, which is no parameter" in record.skipped[0].reason


def test_a_vit_of_torchs_attention_is_folded_whole() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(4, DIM), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(DIM, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    record = apply(capture(model, (torch.randn(2, 6, 4),)), "fold-affine").history[-1]
    assert len([site for site in record.changes if site.kind == "replace layer"]) == 4
    assert not record.skipped
