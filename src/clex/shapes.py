"""Sizes of well-known models, for plans and for random weights that measure speed and memory."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from .errors import ConfigError, unknown

# From the configs that the models are published with; the window is the one training begins from.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def shape(name: str) -> LlamaConfig:
    """The config of a well-known shape, with a window of 8,192 tokens.

    Raises:
        ConfigError: there is no shape of this name.
    """
    if name not in SHAPES:
        raise ConfigError(unknown("shape", name, SHAPES))
    return LlamaConfig(
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        **SHAPES[name],
    )
