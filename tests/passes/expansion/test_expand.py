"""expand: the models the kit tries it on, the weights by hand, training afterwards, and each refusal."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program, RewriteError, apply
from tests.captures import capture, shared
from tests.passes.table import Row

ROWS = [
    Row("expand{hidden=+5 ffn=2x heads=+1}", "PreNormDecoder", 46, again=46, compiled=True),
    Row("expand{layers=+1}", "PreNormDecoder", 28, again=28),
    Row("expand{method=lemon hidden=+5 ffn=+3 heads=+1}", "PreNormDecoder", 46, again=46),
    Row("expand{ffn=2x heads=+2}", "llama", 28, again=28),
    Row("expand{head_dim=+3}", "gpt2", 22, again=22),
    Row("expand{ffn=2x}", "resnet18", 0),
    Row("expand{method=net2net channels=+2}", "ResidualConvolutions", 23, again=23),
]
DIM, HEADS = 16, 4
Norm = Callable[[int], nn.Module]
EPS: Norm = functools.partial(nn.RMSNorm, eps=0.1)


class Attention(nn.Module):
    """Attention with key heads that ``groups`` query heads share, rotary or normalized queries and keys if asked."""

    def __init__(self, groups: int = 1, rotary: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.rotary, self.size, self.groups = rotary, DIM // HEADS, groups
        self.q, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.k, self.v = (nn.Linear(DIM, DIM // groups) for _ in range(2))
        self.normed = nn.RMSNorm(self.size) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = self.normed(q), self.normed(k)
        if self.rotary:
            q, k = (t + torch.cat([-t[..., 2:], t[..., :2]], -1) for t in (q, k))
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(last(gelu(up(norm(x)))))."""

    def __init__(self, norm: Norm = nn.RMSNorm, last: nn.Module | None = None, **kind: bool | int) -> None:
        super().__init__()
        self.norm, self.attention, self.norm2 = norm(DIM), Attention(**kind), norm(DIM)
        self.up, self.last, self.down = nn.Linear(DIM, 8), last or nn.Identity(), nn.Linear(8, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(self.last(F.gelu(self.up(self.norm2(x)))))


class Model(nn.Module):
    """Words, blocks, a norm, a head (or the words' own table)."""

    def __init__(self, norm: Norm = nn.RMSNorm, tied: bool = False, **kind: bool | int) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(11, DIM), norm(DIM), nn.Linear(DIM, 11, bias=False)
        self.layers = nn.ModuleList([Block(norm, **kind) for _ in range(2)])
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@functools.cache
def model(norm: Norm = EPS, tied: bool = False, **kind: int) -> Program:
    """A captured model; its weights are away from 0 and 1."""
    torch.manual_seed(0)
    made = Model(norm, tied, **kind)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return capture(made, (torch.randint(0, 11, (2, 5)),))


@functools.cache
def block(last: Callable[[], nn.Module] = nn.Identity) -> Program:
    torch.manual_seed(0)
    return capture(Block(nn.LayerNorm, last()), (torch.randn(3, 4, DIM),))


def weights(program: Program, text: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """All parameters before and after."""
    return tuple(dict(p.module.named_parameters()) for p in (program, apply(program, text)))  # type: ignore[return-value]


def test_an_ffn_by_hand() -> None:
    old, new = weights(block(), "expand{ffn=+3}")
    assert torch.equal(new["up.weight"][:8], old["up.weight"])
    assert torch.equal(new["down.weight"][:, :8], old["down.weight"])
    assert not new["down.weight"][:, 8:].any()
    assert bool((new["up.weight"][8:] != 0).all())
    assert torch.equal(new["norm2.weight"], old["norm2.weight"])


def test_a_stream_by_hand() -> None:
    old, new = weights(model(), "expand{hidden=27}")
    ratio = (DIM / 27) ** 0.5
    assert torch.allclose(new["norm.weight"][:DIM], ratio * old["norm.weight"])
    assert not new["words.weight"][:, DIM:].any()
    assert not new["layers.0.down.weight"][DIM:].any()
    assert bool((new["layers.0.up.weight"][:, DIM:] != 0).all())
    assert apply(model(), "expand{hidden=27}").module.get_submodule("norm").eps == pytest.approx(0.1 * DIM / 27)


def test_longer_keys_by_hand() -> None:
    old, new = weights(model(), "expand{head_dim=9}")
    heads = [t.unflatten(0, (HEADS, -1)) for t in (old["layers.0.attention.k.weight"], new["layers.0.attention.k.weight"])]
    assert torch.allclose(heads[1][:, :4], (9 / 4) ** 0.5 * heads[0])
    assert not heads[1][:, 4:].any()
    assert bool((new["layers.0.attention.q.weight"].unflatten(0, (HEADS, -1))[:, 4:] != 0).all())


def trained(program: Program, steps: int) -> dict[str, Tensor]:
    """The gradients after some steps of training."""
    module = program.module.train()
    ids = torch.randint(0, 11, (64, 9), generator=torch.Generator().manual_seed(1))
    for step in range(steps + 1):
        module.zero_grad()
        F.cross_entropy(module(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad if step < steps else 0
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("init", ["normal", "zero", "orthogonal", "hadamard", "copy"])
def test_no_new_parameter_stays_untrained_and_no_two_units_are_equal(init: str) -> None:
    """Each parameter, the kept ones too, has a gradient other than 0 after two steps."""
    text = f"expand{{ffn=2.5x heads=+1 head_dim=+2 value_dim=+1 hidden=30 init={init}}}"
    grown = apply(model(), text)
    found = {name: g for name, g in trained(grown, steps=2).items() if not name.endswith("k.bias")}  # softmax takes it out
    for name, gradient in found.items():
        dead = (gradient == 0).float().mean()
        assert dead == 0, f"{name}: {float(dead):.2f} of its gradient is 0"
    for layer in grown.module.layers.children():
        for unit in (layer.up.weight, layer.attention.q.weight, layer.attention.v.weight, layer.norm.weight.unsqueeze(1)):
            assert torch.pdist(unit.detach()).min() > 0


@pytest.mark.parametrize(("text", "size"), [("12", 12), ("+1", 9), ("1.5x", 12), ("8", 8)])
def test_sizes(text: str, size: int) -> None:
    found = apply(block(), f"expand{{ffn={text}}}").module.get_parameter("up.weight")
    assert found.shape == (size, DIM)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expand{ffn=1.3x}", "no whole number: 11 is"),
        ("expand{ffn=many}", "a size is a number"),
        ("expand{ffn=2x where=heads.*}", "matches none"),
        ("expand{hidden=2x}", "the input has this size"),
        ("expand", r"nothing is told to grow: give ffn, .* a size, as in expand\{ffn=2x"),
        ("expand{init=zero}", "nothing is told to grow"),
    ],
)
def test_refused_sizes(text: str, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        apply(block(), text)


def test_a_tied_head_stays_tied() -> None:
    module = apply(model(tied=True), "expand{hidden=+4}").module
    assert module.get_parameter("head.weight") is module.get_parameter("words.weight")


def test_entries_that_meet_in_a_norm_are_named() -> None:
    with pytest.raises(RewriteError, match=r"ffn cannot grow .*meet in norm"):
        apply(block(functools.partial(nn.LayerNorm, 8)), "expand{ffn=2x}")


def names(program: Program) -> list[str]:
    return list(program.module.state_dict())


@pytest.mark.parametrize(("text", "olds"), [("+1", (0, 1)), ("2x", (0, 2)), ("+2 at=end", (0, 1)), ("5 at=copy", (0, 2))])
def test_layers_are_numbered_in_order(text: str, olds: tuple[int, int]) -> None:
    """The old blocks keep their bytes under their new numbers; what writes to the stream is 0 in the new ones."""
    before = model()
    after = apply(before, f"expand{{layers={text}}}")
    old, new = before.module.state_dict(), after.module.state_dict()
    runs = [str(node.target) for node, _ in after.layers()]
    assert len(runs) == len(set(runs)), "a block runs twice"
    assert [r.split(".")[1] for r in runs if r.startswith("layers.")] == sorted(
        r.split(".")[1] for r in runs if r.startswith("layers.")
    )
    found = list(dict.fromkeys(name.split(".")[1] for name in names(after) if name.startswith("layers.")))
    assert found == [str(i) for i in range(len(found))]
    for block, place in enumerate(olds):
        own = [name for name in old if name.startswith(f"layers.{block}.")]
        assert all(torch.equal(old[n], new[n.replace(f"layers.{block}.", f"layers.{place}.")]) for n in own)
    fresh = [i for i in range(len(found)) if i not in olds]
    assert not any(
        new[f"layers.{i}.{name}"].any() for i in fresh for name in ("attention.out.weight", "down.weight", "down.bias")
    )
    assert all(new[f"layers.{i}.attention.q.weight"].any() for i in fresh)
    copied = torch.equal(new[f"layers.{fresh[0]}.up.weight"], old["layers.0.up.weight"])
    assert copied == ("copy" in text)


class Biased(nn.Module):
    """Blocks that all use a bias by distance, which the first one makes, as T5's do."""

    class Block(nn.Module):
        def __init__(self, makes: bool) -> None:
            super().__init__()
            self.norm, self.mix, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
            self.bias = nn.Embedding(5, 1) if makes else None

        def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if self.bias is not None:
                places = torch.arange(x.shape[1])
                bias = self.bias((places[:, None] - places[None]).abs().clamp(max=4)).squeeze(-1)
            assert bias is not None
            return x + self.out(bias.softmax(-1) @ self.mix(self.norm(x))), bias

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block(makes) for makes in (True, False))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return self.norm(x)


def test_what_a_block_makes_for_all_is_made_once() -> None:
    after = apply(Biased(), "expand{layers=2x}", args=(torch.randn(2, 6, DIM),))
    assert [name for name in names(after) if "bias.weight" in name] == ["layers.0.bias.weight"]
    assert sum(name.endswith("mix.weight") for name in names(after)) == 4


def test_all_six_at_once_train_on() -> None:
    text = "expand{ffn=2x heads=+1 head_dim=+2 value_dim=+1 hidden=30 layers=+3}"
    gradients = trained(apply(model(), text), steps=3)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if not name.endswith("k.bias"))


def test_layers_of_post_norm_models_are_refused() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(DIM, HEADS, 8, batch_first=True) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x)).sum(-1)

    with pytest.raises(RewriteError, match=r"Post-LN: layers.0.norm1 normalizes the stream"):
        apply(Post(), "expand{layers=+1}", (torch.randn(2, 3, DIM),))


def test_fewer_layers_name_the_pass_for_that() -> None:
    with pytest.raises(RewriteError, match="to shrink it is pruning: drop-blocks"):
        apply(model(), "expand{layers=1}")


class PostNorm(nn.Module):
    """Two layers that normalize the stream itself, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(DIM, HEADS, 8, 0.0, batch_first=True) for _ in range(2)])
        self.words, self.head = nn.Embedding(11, DIM), nn.Linear(DIM, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0](self.words(ids))))


def post() -> Program:
    torch.manual_seed(0)
    return capture(PostNorm(), (torch.randint(0, 11, (2, 5)),))


LEMON = "expand{method=lemon hidden=39 ffn=+3 heads=+1 layers=+1}"


def test_copies_by_hand() -> None:
    old, new = weights(model(nn.LayerNorm), "expand{method=lemon hidden=39}")
    words, share = new["words.weight"], 32 / 39
    assert torch.equal(words[:, :32], old["words.weight"].repeat(1, 2))
    assert torch.allclose(words[:, 32:], old["words.weight"].mean(1, keepdim=True).expand(-1, 7))
    assert torch.allclose(new["norm.weight"][:DIM], share**0.5 * old["norm.weight"])
    assert not new["norm.bias"][32:].any()
    head = new["head.weight"]
    assert torch.allclose(head[:, :DIM] + head[:, DIM:32], old["head.weight"], atol=1e-6)
    assert (head[:, :DIM] - head[:, DIM:32]).abs().min() > 0
    assert apply(model(nn.LayerNorm), "expand{method=lemon hidden=39}").module.get_submodule("norm").eps == 1e-5 * share


@pytest.mark.parametrize("norm", [nn.LayerNorm, EPS])
def test_copies_train_apart(norm: Norm) -> None:
    program = apply(model(norm), LEMON)
    gradients = trained(program, steps=3)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if not name.endswith("k.bias"))
    for layer in program.module.layers.children():
        for unit in (layer.up.weight, layer.attention.q.weight, layer.attention.out.weight, layer.down.weight.T):
            assert torch.pdist(unit.detach()).min() > 0


def test_noise_at_a_ratio() -> None:
    old, new = weights(model(nn.LayerNorm), "expand{method=clone hidden=2x snr=10}")
    head = new["head.weight"]
    noise, share = (head[:, :DIM] - head[:, DIM:]) / 2, old["head.weight"].std() / 2
    assert float(20 * (share / noise.std()).log10()) == pytest.approx(10, abs=4)
    _, plain = weights(model(nn.LayerNorm), "expand{method=clone hidden=2x}")
    assert torch.equal(plain["head.weight"], old["head.weight"].repeat(1, 2) / 2)


def test_post_norm_by_whole_factors() -> None:
    module = apply(post(), "expand{method=lemon hidden=2x ffn=+3 heads=+1}").module
    assert module.get_parameter("layers.1.self_attn.in_proj_weight").shape == (3 * (DIM + DIM // HEADS), 2 * DIM)


class Numbered(nn.Module):
    """A stream whose units are multiplied by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 4)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.down(F.gelu(self.up(self.norm(y) * torch.arange(6))))
        return self.last(self.norm(y))


def numbered() -> Program:
    return capture(Numbered(), (torch.randn(3, 5, 4),))


class Shifted(nn.Module):
    """A stream to all of whose units one trained number is added, 0 at first, as in HGNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 4)
        self.up, self.down, self.shift = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.shift
        y = y + self.down(F.gelu(self.up(self.norm(y))))
        return self.last(y)


def shifted() -> Program:
    return capture(Shifted(), (torch.randn(3, 5, 4),))


class Filtered(nn.Module):
    """A stream whose units are filtered one by one before they are normalized, as ConvNeXt's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(6)
        self.filter, self.mix = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.mix(self.norm(self.filter(y.transpose(1, 2)).transpose(1, 2)))
        return self.last(self.norm(y))


def filtered() -> Program:
    return capture(Filtered(), (torch.randn(3, 5, 4),))


def perceptron() -> Program:
    return capture(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), (torch.randn(5, 4),))


of = functools.partial
REFUSED: dict[str, tuple[Callable[[], Program], str, str]] = {
    "rotary embeddings": (of(model, rotary=True), "head_dim=2x", "rotary embeddings .* grow value_dim or heads"),
    "QK-norm": (of(model, normed=True), "head_dim=2x", "QK-norm.* grow value_dim or heads"),
    "LayerNorm": (
        of(model, nn.LayerNorm),
        "hidden=2x",
        "LayerNorm at layers.0.norm .* run rmsnorm first, or use method=lemon; what can grow here: ffn, heads, head_dim",
    ),
    "a stream tied to something rigid": (numbered, "hidden=+1", r"hidden cannot grow .*order.*; what can grow here: ffn$"),
    "one number added to all": (shifted, "hidden=+1", "hidden cannot grow .*meet in shift: new ones would be felt; .*ffn$"),
    "a tied head": (of(model, tied=True), "method=clone hidden=2x", "words.weight .* tied.*: untie=true gives each"),
    "Post-LN": (post, "method=lemon hidden=+1", "Post-LN: layers.0.norm1 writes to the stream .*: use a multiple of 16"),
    "a depthwise filter": (
        filtered,
        "method=lemon hidden=+1",
        "filter filters its units one by one, .* multiple of 6",
    ),
    "part of a copy": (model, "method=clone hidden=24", "and hidden would be 1.5 times 16: use a whole factor, or .*lemon"),
    "heads beside groups": (of(model, groups=2), "heads=5", "no whole groups of 2 that share keys: 6 are"),
    "GELU": (perceptron, "method=net2net layers=+1", "1 can get .*: GELU is not idempotent.*that takes a ReLU"),
    "a smaller size": (block, "ffn=4", "ffn.0 is 8 and would be 4: expand grows; to shrink it is pruning: slice"),
    "longer heads by copies": (model, "method=clone head_dim=2x", "method=clone copies ffn, heads, hidden; .* method=pad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_way_out(name: str) -> None:
    make, text, words = REFUSED[name]
    program = make()
    with pytest.raises(RewriteError, match=words):
        apply(program, f"expand{{{text}}}", verify=False)


def test_a_tied_head_is_given_its_own_weight() -> None:
    module = apply(model(tied=True), "expand{method=clone hidden=2x untie=true}").module
    assert module.get_parameter("head.weight") is not module.get_parameter("words.weight")


def test_a_model_that_runs_no_longer_than_its_example() -> None:
    """The whole program is one part, and what it does not run on counts for nothing."""

    class Fixed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(5, DIM)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    record = apply(Fixed(), "expand{hidden=+3}", (torch.randint(0, 11, (2, 5)),)).history[-1]
    assert record.verification is not None
    assert any("not on a larger size" in check.detail for check in record.verification.checks)


def test_an_activation_that_adds_to_its_input_is_no_stream() -> None:
    class Leaky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.softplus(x)

    made = apply(block(Leaky), "expand{ffn=2x}")
    assert made.module.get_parameter("up.weight").shape == (16, DIM)


class Convolutions(nn.Module):
    """Convolutions with BatchNorm, one of them depthwise, concatenated, flattened into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depthwise, self.side = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(3, 6, 1)
        self.both, self.flat, self.head = nn.Conv2d(10, 5, 1), nn.Linear(5 * 16, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.depthwise(self.bn(self.one(x)).relu()), self.side(x)], 1)
        return self.head(self.flat(self.both(y).relu().flatten(1)).relu())


def test_channels_are_copied_through_batch_norm_concatenation_and_depthwise_convolutions() -> None:
    torch.manual_seed(0)
    before = capture(Convolutions().train(), (torch.randn(4, 3, 4, 4),))
    after = apply(before, "expand{method=net2net channels=+3}")
    old, new = before.module.state_dict(), after.module.state_dict()
    assert {n: tuple(t.shape) for n, t in new.items() if n.endswith("weight")} == {
        "one.weight": (7, 3, 3, 3),
        "bn.weight": (7,),
        "depthwise.weight": (7, 1, 3, 3),
        "side.weight": (9, 3, 1, 1),
        "both.weight": (8, 16, 1, 1),
        "flat.weight": (10, 128),
        "head.weight": (2, 10),
    }
    assert torch.equal(new["one.weight"], old["one.weight"][[0, 1, 2, 3, 0, 1, 2]])
    assert torch.equal(new["bn.running_var"], old["bn.running_var"][[0, 1, 2, 3, 0, 1, 2]])
    reads = new["head.weight"]
    assert torch.allclose(reads[:, :3] + reads[:, 7:], old["head.weight"][:, :3])
    assert not torch.allclose(reads[:, :3], reads[:, 7:])
    assert [skip.reason for skip in after.history[-1].skipped] == ["the model's output has this size"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("layers=+2", [2, 2]), ("layers=2x at=end", [1, 3]), ("layers=+1 where=2", [2, 1])],
)
def test_identities_behind_idempotent_activations(text: str, layers: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, (1, 2), bias=False), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(8 * 6 * 5, 3)),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    after = apply(model, f"expand{{method=net2net {text}}}", (x,))
    kinds = [type(layer) for _, layer in after.layers()]
    assert [kinds.count(nn.Hardtanh), kinds.count(nn.ReLU)] == layers
    assert torch.allclose(after.module.eval()(x), model(x), rtol=0, atol=1e-6)
    new = [p for name, p in after.module.named_parameters() if "deeper" in name]
    after.module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new)


def test_what_is_not_idempotent_gets_no_identities() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(5, 4)
    mixed = nn.Sequential(*model[:2], nn.Linear(8, 8), nn.ReLU())
    record = apply(mixed, "expand{method=net2net layers=+1}", (x,)).history[-1]
    assert [skip.path for skip in record.skipped] == ["1"]
    for text in ("method=net2net", "method=net2net channels=2x layers=+1"):
        with pytest.raises(RewriteError, match="one of the two"):
            apply(model, f"expand{{{text}}}", (x,))


def test_channels_that_meet_are_named() -> None:
    made = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(RewriteError, match=r"channels cannot be copied .* meet in norm"):
        apply(made, "expand{method=net2net channels=2x}", (torch.randn(4, 5),))
    with pytest.raises(RewriteError, match="channels and method=net2net go together"):
        apply(made, "expand{channels=2x}", (torch.randn(4, 5),))


def test_parallel_branches_are_added_up_before_the_stream() -> None:
    class Parallel(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + F.dropout(self.attention(y) + self.down(F.gelu(self.up(y))), 0.1, self.training)

    class Net(Model):
        def __init__(self) -> None:
            super().__init__(EPS)
            self.layers = nn.ModuleList([Parallel(EPS), Parallel(EPS)])

    made = apply(Net(), "expand{layers=+1}", (torch.randint(0, 11, (2, 5)),))
    assert not made.module.get_parameter("layers.2.down.weight").any()


class FormedBias(nn.Module):
    """A bias that is added in another form, a part of it even, and one within a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bias, self.places = nn.Linear(4, 8), nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(9, 8))
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.bias.view(1, 1, -1) + self.places[:5]
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_a_bias_in_another_form_is_one() -> None:
    """Its new entries are 0, as those of any other."""
    program = apply(FormedBias(), "expand{hidden=+3}", args=(torch.randn(2, 5, 4),))
    assert not program.module.get_parameter("bias")[8:].any()
    assert not program.module.get_parameter("places")[:, 8:].any()


def test_a_bias_within_a_layer_of_a_pass_is_one() -> None:
    """EvoNorm's, whose numbers were 0 in the model and no longer are."""
    program = apply(shared("ResidualConvolutions"), "evonorm")
    torch.nn.init.normal_(program.module.get_parameter("bn0.bias"))
    assert not apply(program, "expand{hidden=+5}").module.get_parameter("bn0.bias")[8:].any()
