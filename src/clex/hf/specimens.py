"""A small random model of any decoder family that the installed transformers knows."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from ..errors import ConfigError, unknown
from .discovery import has_rotary_forward

VOCABULARY = 128
WINDOW = 64

# What a setting becomes in a config that has it. All others keep their defaults.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW,
    # At the usual 0.02 attention is all but flat in a model of this size, and no logit would
    # notice where a token stands.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
}
# The same for all whole numbers with this in their name.
_SIZES_BY_PART: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "routed_experts": 4,
    "experts_per_tok": 2,
    "moe_topk": 2,
}
# Where a family's parts do not fit one another after that, or its rotary is off by default.
_MLP_AND_HEADS = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_SMALL_PART = {**_MLP_AND_HEADS, "num_hidden_layers": 1}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 16},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": _SMALL_PART,
        "encoder_config": {**_SMALL_PART, "hidden_size_global": 32},
        "decoder_config": {**_SMALL_PART, "hidden_size_global": 32},
        "global_config": _SMALL_PART,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48},
    },
    "dots1": {"n_shared_experts": 1},
    # Its rope_parameters are not by layer type.
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "num_hidden_layers": 4,
    },
    # Legacy names of the settings of its sliding layers.
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "position_embedding_type": "rope",
    },
    "hunyuan_vl_text": {
        "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]},
    },
    "gemma3n_text": {"intermediate_size": 48},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 1},
    "phi4_multimodal": {
        "vision_config": {**_SMALL_PART, "num_hidden_layers": 2, "image_size": 28, "crop_size": 28},
        "audio_config": {
            **_MLP_AND_HEADS,
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": VOCABULARY,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "num_hidden_layers": 4,
    },
    # Its way of one token at a time leaves out the lower limit of the time step.
    "zamba2": {"chunk_size": 16, "use_mem_rope": True, "time_step_min": 1e-9},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 16},
}


@cache
def family_names() -> tuple[str, ...]:
    """Model types of all text decoders in transformers' own tables, sorted.

    These are the causal language models, and the decoders of image-text models that have a class of
    their own. A model of several parts is there by its decoder's type, as in ``gemma3_text``.
    """
    names = {_decoder_type(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        decoder = _decoder_type(name)
        if decoder != name and decoder in MODEL_MAPPING_NAMES:
            names.add(decoder)
    return tuple(sorted(names - {None}))  # type: ignore[arg-type]


def _decoder_type(name: str) -> str | None:
    """The type of a model's text decoder; None where any other family may take that place."""
    decoder: Any = CONFIG_MAPPING[name].sub_configs.get("text_config")
    if decoder is None:
        return name
    if decoder is AutoConfig:
        return None
    own: str = decoder.model_type
    return own if own in MODEL_MAPPING_NAMES else name


def model_class(name: str) -> type[nn.Module]:
    """The class of a family's causal language model, or of its decoder if it has no such class.

    Raises:
        ConfigError: transformers has no family of this name.
    """
    if name not in family_names():
        raise ConfigError(unknown("family", name, family_names()))
    config_type = CONFIG_MAPPING[name]
    mapping = (
        MODEL_FOR_CAUSAL_LM_MAPPING if config_type in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    )
    return cast(type[nn.Module], mapping[config_type])


def has_rotary_code(name: str) -> bool:
    """Whether the file of a family's model has a rotary class of the common form."""
    file = sys.modules[model_class(name).__module__]
    return any(
        inspect.isclass(value) and issubclass(value, nn.Module) and has_rotary_forward(value)
        for value in vars(file).values()
    )


def small_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a family with small sizes; `changes` go over all of them.

    Raises:
        ConfigError: transformers has no family of this name.
    """
    if name not in family_names():
        raise ConfigError(unknown("family", name, family_names()))
    config_type: Any = CONFIG_MAPPING[name]
    config_type = config_type.sub_configs.get("text_config", config_type)
    plain: dict[str, Any] = config_type().to_dict()
    known = {*plain, *config_type.attribute_map}
    settings: dict[str, Any] = {
        key: size
        for key, value in plain.items()
        for part, size in _SIZES_BY_PART.items()
        if part in key
        and not isinstance(value, bool | list)
        and (value is not None or "expert" in part)
    }
    settings.update({key: size for key, size in _SIZES.items() if key in known})
    if plain.get("sliding_window") is None:
        settings.pop("sliding_window", None)
    if "kv_lora_rank" in known:
        # Latent attention has no groups, and its head size comes from its parts.
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        settings.pop("head_dim", None)
    rope = plain.get("rope_parameters") or {}
    types = list(dict.fromkeys(plain.get("layer_types") or plain.get("layers_block_type") or [""]))
    if plain.get("layer_types"):
        types += [key for key in rope if isinstance(rope[key], dict) and key not in types]
    # Two layers of each type, so that what is made anew for each layer is seen to be.
    settings["num_hidden_layers"] = layers = 2 * len(types)
    for key, kinds in (
        ("layer_types", types),
        ("layers_block_type", types),
        ("mlp_layer_types", list(dict.fromkeys(plain.get("mlp_layer_types") or []))),
    ):
        if plain.get(key):
            settings[key] = [kinds[i % len(kinds)] for i in range(layers)]
    if rope.get("mrope_section"):
        half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
        side = half * 3 // 8
        settings["rope_parameters"] = {**rope, "mrope_section": [half - 2 * side, side, side]}
    return config_type(**{**settings, **_OVERRIDES.get(name, {}), **changes})


def small_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of a family in evaluation mode; the same seed gives the same weights.

    Raises:
        ConfigError: transformers has no family of this name.
    """
    config, model_type = small_config(name, **changes), cast(Any, model_class(name))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = model_type._from_config(config)
        for parameter in model.parameters():
            if not parameter.any():
                # A gate that starts closed would hide what is behind it.
                nn.init.normal_(parameter, std=_SIZES["initializer_range"])
    return model.eval()
