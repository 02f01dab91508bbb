"""Example inputs: that inferred ones run the model, and what `--inputs` can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError
from rewrite.sources.inputs import infer_inputs, parse_inputs
from tests.models.zoo import timm_model

# ---- inferred --------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
TYPES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 12},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50},
    "llama": SMALL | {"num_key_value_heads": 2},
    "mamba": SMALL,
    "deberta-v2": SMALL,
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 50},
    "bros": SMALL | {"hidden_size": 64},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "vocab_size": 50,
    },
    "vit": SMALL | {"image_size": 32, "num_channels": 1},
    "videomae": SMALL | {"image_size": 32, "num_frames": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "clip": {
        "text_config": SMALL | {"max_position_embeddings": 20},
        "vision_config": SMALL | {"image_size": 64},
        "projection_dim": 8,
    },
    "vilt": SMALL | {"image_size": 64},
    "whisper": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 50,
        "max_source_positions": 20,
        "pad_token_id": 0,
    },
    "wav2vec2": SMALL | {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4},
    "audio-spectrogram-transformer": SMALL | {"max_length": 64},
    "patchtst": {"num_input_channels": 2, "context_length": 24, "d_model": 16, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_run_on_what_is_inferred(kind: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TYPES[kind])
    model = transformers.AutoModel.from_config(config).eval()
    args, kwargs = infer_inputs(model)
    assert args == ()
    assert all(value.shape[0] == 2 for value in kwargs.values())
    with torch.no_grad():
        assert model(**kwargs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_vit", {"img_size": 96, "in_chans": 1}, (1, 96, 96)),
        ("test_resnet", {"in_chans": 4}, (4, 160, 160)),
        ("test_mambaout", {}, (3, 160, 160)),
    ],
)
def test_timm_sizes_are_those_the_model_was_built_for(name: str, options: dict[str, Any], size: tuple[int, ...]) -> None:
    model = timm_model(name, **options).eval()
    (image,), _ = infer_inputs(nn.Sequential(model, nn.Identity()))
    assert image.shape == (2, *size)
    with torch.no_grad():
        model(image)


def small_gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, **options))


class Settings:
    """A configuration as transformers has them."""

    model_type = "by hand"

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Tower(nn.Module):
    """Takes what a vision tower for images of any size takes."""

    main_input_name: Any = "input_ids"

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.config = Settings(**values)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        merged = self.config.spatial_merge_size**2
        assert hidden_states.shape[0] == grid_thw.prod(1).sum()
        return hidden_states.view(-1, merged, hidden_states.shape[1]).mean(1)


class Cut(Tower):
    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        assert torch.equal(pixel_attention_mask.sum(1), spatial_shapes.prod(1))
        return pixel_values * pixel_attention_mask[..., None]


class Placed(Tower):
    def forward(self, pixel_values: Tensor, pixel_position_ids: Tensor) -> Tensor:
        assert pixel_position_ids.unique(dim=1).shape == pixel_position_ids.shape
        return pixel_values + pixel_position_ids.sum(-1, keepdim=True)


class Sound(Tower):
    main_input_name = "input_features"

    def forward(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        assert input_features_mask is not None
        assert 0 < input_features_mask.sum() < input_features_mask.numel()
        return input_features * input_features_mask[..., None]


class Series(Tower):
    main_input_name = "past_values"

    def forward(self, past_values: Tensor, past_time_features: Tensor, past_observed_mask: Tensor) -> Tensor:
        return (past_values * past_observed_mask)[..., None] + past_time_features


class Query(Tower):
    main_input_name = ("query_embeds", "prompt_input_ids")

    def forward(self, query_embeds: Tensor, prompt_input_ids: Tensor, seed: int = 0) -> Tensor:
        return query_embeds + prompt_input_ids[..., None]


class Elsewhere(Tower):
    """Its class says that it takes images, and it takes text."""

    main_input_name = "pixel_values"

    def forward(self, input_ids: Tensor | None = None) -> Tensor:
        assert input_ids is not None
        return input_ids


class InSession(Tower):
    def forward(self, session: Any) -> Tensor:
        return session


TOWERS: dict[str, tuple[nn.Module, dict[str, tuple[int, ...]]]] = {
    "grid": (
        Tower(patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=3),
        {"hidden_states": (48, 96), "grid_thw": (2, 3)},
    ),
    "cut": (Cut(patch_size=4), {"pixel_values": (2, 16, 48), "pixel_attention_mask": (2, 16), "spatial_shapes": (2, 2)}),
    "placed": (Placed(patch_size=4, num_channels=1), {"pixel_values": (2, 16, 16), "pixel_position_ids": (2, 16, 2)}),
    "sound": (Sound(num_mel_bins=8), {"input_features": (2, 64, 8), "input_features_mask": (2, 64)}),
    "series": (
        Series(lags_sequence=[1, 4], context_length=10, num_time_features=3),
        {"past_values": (2, 14), "past_time_features": (2, 14, 3), "past_observed_mask": (2, 14)},
    ),
    "query": (Query(hidden_size=8, vocab_size=9), {"query_embeds": (2, 16, 8), "prompt_input_ids": (2, 16)}),
    "elsewhere": (Elsewhere(vocab_size=9), {"input_ids": (2, 16)}),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_what_signature_and_configuration_tell(kind: str) -> None:
    model, shapes = TOWERS[kind]
    args, kwargs = infer_inputs(model)
    assert args == ()
    assert {name: tuple(value.shape) for name, value in kwargs.items()} == shapes
    assert model(**kwargs).numel()


def test_tokens_are_ordinary_words_that_end_with_eos() -> None:
    _, kwargs = infer_inputs(small_gpt2(vocab_size=6, eos_token_id=5, bos_token_id=4, pad_token_id=0))
    ids = kwargs["input_ids"]
    assert ids[:, -1].tolist() == [5, 5]
    assert set(ids[:, :-1].unique().tolist()) <= {1, 2, 3}


def test_lengths_keep_to_the_positions() -> None:
    _, kwargs = infer_inputs(small_gpt2(vocab_size=9, n_positions=8))
    assert kwargs["input_ids"].shape == kwargs["attention_mask"].shape == (2, 6)


def test_seed_dtype_and_device_are_kept() -> None:
    class Net(nn.Linear):
        pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    model = Net(1, 1, dtype=torch.bfloat16)
    first, again, other = (infer_inputs(model, seed=seed)[0][0] for seed in (1, 1, 2))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert infer_inputs(model.to("meta"))[0][0].device.type == "meta"


@pytest.mark.parametrize(
    ("own", "call"),
    [
        (torch.ones(2, 3), ((torch.ones(2, 3),), {})),
        ((1, 2), ((1, 2), {})),
        ({"x": 1}, ((), {"x": 1})),
        (((1,), {"x": 2}), ((1,), {"x": 2})),
        (lambda: [3], ((3,), {})),
    ],
)
@pytest.mark.parametrize("attribute", ["example_inputs", "example_input_array"])
def test_own_example_inputs_come_first(own: Any, call: Any, attribute: str) -> None:
    model: Any = nn.Identity()
    setattr(model, attribute, own)
    assert repr(infer_inputs(model)) == repr(call)


def test_own_example_inputs_of_no_known_form() -> None:
    model: Any = nn.Identity()
    model.example_inputs = 3
    with pytest.raises(RewriteError, match=r"Identity\.example_inputs is a int"):
        infer_inputs(model)


def test_what_cannot_be_inferred_says_what_to_pass() -> None:
    with pytest.raises(RewriteError, match=r"forward takes \(input\): pass --inputs \(2x3"):
        infer_inputs(nn.Linear(2, 2))
    with pytest.raises(RewriteError, match="nothing is known about session; forward takes \\(session\\)"):
        infer_inputs(InSession())


# ---- text ------------------------------------------------------------------------------------------------


def only(spec: str) -> Tensor:
    (value,), kwargs = parse_inputs(spec)
    assert not kwargs
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        ("2x3x8x8", (2, 3, 8, 8), torch.float32),
        ("int64[2,16]", (2, 16), torch.int64),
        ("int64[2, 16; 0..100]", (2, 16), torch.int64),
        ("bfloat16[4]", (4,), torch.bfloat16),
        ("bool[2,2]", (2, 2), torch.bool),
        ("float64[]", (), torch.float64),
        ("float16[2,0]", (2, 0), torch.float16),
    ],
)
def test_tensors(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (only(spec).shape, only(spec).dtype) == (shape, dtype)
    assert torch.equal(only(spec), only(spec))


def test_ranges() -> None:
    ids = only("int64[1000;3..6]")
    assert set(ids.tolist()) == {3, 4, 5}
    values = only("float32[1000;-1..0.5]")
    assert -1 <= values.min() < -0.9
    assert 0.4 < values.max() < 0.5
    assert only("int64[3;1]").tolist() == [1, 1, 1]
    assert only("int32[1000]").unique().tolist() == list(range(10))


def test_names_literals_and_separators() -> None:
    args, kwargs = parse_inputs(["2x3 True; 4", "a=int64[2,3;0..5] b=None;c=-1.5e2", "d=False"])
    assert args[0].shape == (2, 3)
    assert args[1:] == (True, 4)
    assert kwargs["a"].shape == (2, 3)
    assert [kwargs[name] for name in "bcd"] == [None, -150.0, False]


def test_seed_of_text() -> None:
    assert not torch.equal(parse_inputs("2x3")[0][0], parse_inputs("2x3", seed=1)[0][0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("int46[2]", "'int46' is no dtype in 'int46\\[2\\]'; did you mean 'int64'"),
        ("complex64[2]", "the dtypes are float32"),
        ("int64[2,a]", "'a' is no size"),
        ("int64[2,]", "'' is no size"),
        ("int64[-1]", "'-1' is no size"),
        ("int64[2;5..3]", "'5..3' is no range"),
        ("int64[2;]", "'' is no range"),
        ("2x", "cannot read '2x'"),
        ("int64[2", r"cannot read 'int64\[2'"),
        ("1a=2x3", "'1a' is no argument name"),
        ("a=2x3 2x3", "'2x3' has no name"),
        ("a=1 a=2", "'a' is given twice"),
        ("a=", "cannot read 'a='"),
        ("model.pt 2x3", r"cannot read 'model\.pt'"),
    ],
)
def test_mistakes_show_the_piece(spec: str, message: str) -> None:
    with pytest.raises(RewriteError, match=message) as caught:
        parse_inputs(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("saved", [torch.ones(2), (torch.ones(2), 3), {"x": torch.ones(2)}, [[1], {"x": 2}]])
def test_files(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "inputs.pt")
    args, kwargs = parse_inputs(str(tmp_path / "inputs.pt"))
    expected = {Tensor: (1, 0), tuple: (2, 0), dict: (0, 1), list: (1, 1)}[type(saved)]
    assert (len(args), len(kwargs)) == expected


def test_file_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "inputs.pt"
    for content, message in (
        (None, "there is no file"),
        (nn.Linear(1, 1), "cannot read"),
        (3, "is a int"),
        ({1: 2}, "is a dict"),
    ):
        if content is not None:
            torch.save(content, path)
        with pytest.raises(RewriteError, match=message) as caught:
            parse_inputs(str(path))
        assert "\n" not in str(caught.value)
