"""What branches and blocks add on data, against the same by hand; chains and their costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError, apply
from rewrite.analysis.branches import branches
from rewrite.analysis.costs import depth_of, flops
from rewrite.analysis.view import critical_path, view
from tests.captures import capture, shared

DIM, DEPTH = 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        if self.skipped:
            return x
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.ffn(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, DIM), nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x)))

    def states(self, x: Tensor) -> list[Tensor]:
        """The values between the blocks."""
        found = [self.embed(x)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_influence_and_contribution_by_hand(model: Model) -> None:
    data = [torch.randn(2, 5, 4), torch.randn(3, 5, 4)]
    found = rewrite.depth(capture(model, (data[0],)), data, dependency=False)
    assert [block.layer for block in found.blocks] == list(range(DEPTH))
    assert [b.kind for b in found.blocks[0].branches] == ["attention", "ffn"]
    assert found.dependency == ()
    assert found.calls == 2
    pairs: list[list[Tensor]] = [[] for _ in range(DEPTH)]
    added = base = 0.0
    with torch.no_grad():
        for x in data:
            states = model.states(x)
            for i in range(DEPTH):
                pairs[i].append(torch.cosine_similarity(states[i], states[i + 1], dim=-1).flatten())
            block = model.blocks[1]
            y = block.norm1(states[1])
            branch = block.attention(y, y, y, need_weights=False)[0]
            added, base = added + float(branch.square().sum()), base + float(states[1].square().sum())
    for i in range(DEPTH):
        assert found.blocks[i].influence == pytest.approx(1 - float(torch.cat(pairs[i]).mean()), abs=1e-6)
    assert found.blocks[1].branches[0].contribution == pytest.approx((added / base) ** 0.5, rel=1e-5)


def test_dependency_equals_brute_force(model: Model) -> None:
    x = torch.randn(3, 5, 4)
    found = rewrite.depth(capture(model, (x,)), [x]).dependency
    with torch.no_grad():
        whole = model.states(x)
        for i in range(DEPTH):
            model.blocks[i].skipped = True
            without = model.states(x)
            model.blocks[i].skipped = False
            for j in range(i + 1, DEPTH):
                ours, theirs = whole[j + 1] - whole[j], without[j + 1] - without[j]
                expected = 1 - float(torch.cosine_similarity(ours, theirs, dim=-1).mean())
                assert found[i][j] == pytest.approx(expected, abs=1e-6)
            assert found[i][: i + 1] == (0.0,) * (i + 1)


def test_chains_are_shorter_without_attention(model: Model) -> None:
    x = torch.randn(2, 5, 4)
    program = capture(model, (x,))
    before = rewrite.depth(program, [x], dependency=False)
    after = rewrite.depth(apply(program, "drop-attention{layers='0-3'}"), [x], dependency=False)
    # q (or k, v), attention, output, two of the FFN; once the embedding
    assert (before.chain, after.chain) == (1 + 5 * DEPTH, 1 + 2 * DEPTH)
    assert after.flops < before.flops


def test_flops_of_a_linear_layer_and_of_attention() -> None:
    program = capture(Block().eval(), (torch.randn(2, 5, DIM),))
    found = {str(n.target): flops(program, n) for n in program.graph.nodes if flops(program, n)}
    assert found["ffn.0"] == 2 * 10 * DIM * 16
    path, total = critical_path(program, lambda node: depth_of(program, node))
    assert total == 5
    assert [n for n in path if str(n.target) == "ffn.2"]
    graph = view(program)
    assert len(graph) == len(program.graph.nodes)


def test_auto_drops_what_adds_least(model: Model) -> None:
    x = [torch.randn(2, 5, 4)]
    program = capture(model, (x[0],))
    told = rewrite.depth(program, x, dependency=False).blocks[:-1]
    for text, weigh in (
        ("drop-ffn{layers=auto:2}", lambda block: block.branches[1].contribution),
        ("drop-blocks{layers=auto:2}", lambda block: block.influence),
    ):
        least = {block.layer for block in sorted(told, key=weigh)[:2]}
        result = apply(program, text, data=x)
        kind = {"ffn"} if text.startswith("drop-ffn") else {"attention", "ffn"}
        gone = {b.path for b in branches(program)} - {b.path for b in branches(result)}
        assert gone == {b.path for b in branches(program) if b.layer in least and b.kind in kind}


@pytest.mark.parametrize(
    ("text", "data", "words"),
    [
        ("drop-ffn{layers=auto:1}", None, "chooses by data: give some with --data"),
        ("drop-ffn{layers=auto:4}", [torch.randn(2, 5, 4)], "there are 3 to choose from, the last one aside"),
        ("drop-ffn{layers=auto:x}", None, "no list of numbers"),
    ],
)
def test_auto_is_refused_with_the_way_out(model: Model, text: str, data: object, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        apply(capture(model, (torch.randn(2, 5, 4),)), text, data=data)


def test_a_model_without_branches_is_refused() -> None:
    with pytest.raises(RewriteError, match="no residual branches"):
        rewrite.depth(capture(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)), [torch.randn(2, 4)])


def test_post_norm_and_convolutional_models() -> None:
    for name in ("bert", "resnet18"):
        program = shared(name)
        data = [(tuple(program.example_args), dict(program.example_kwargs))]
        found = rewrite.depth(program, data)
        assert len(found.dependency) == len(found.blocks) == len({b.layer for b in branches(program)})
        assert all(block.influence >= -1e-6 for block in found.blocks)
