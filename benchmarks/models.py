"""Models of the benchmarks of speed: known shapes with random weights, plain and extended."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clex.config import ClexConfig
from clex.hf.extend import extend

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}


def plain_model(shape: str, device: str) -> Any:
    """Random weights in bfloat16, for reading."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    return model.to(torch.bfloat16).eval()


def pair(shape: str, device: str, max_scale: float = 16.0) -> tuple[Any, Any]:
    """A plain model in bfloat16 and an extended one; both have the same parameters, not copies."""
    plain = plain_model(shape, device)
    shared = {id(parameter): parameter for parameter in plain.parameters()}
    extended = extend(copy.deepcopy(plain, shared), ClexConfig(max_scale=max_scale))
    for scaling in extended.model.rotary_emb.scalings.values():
        torch.nn.init.normal_(scaling.field.outer.weight, std=0.1)
    return plain, extended.eval()


def random_tokens(shape: str, length: int, device: str) -> torch.Tensor:
    """Token numbers (1, length), the same in every run."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[shape]["vocab_size"]
    return torch.randint(vocabulary, (1, length), generator=generator).to(device)
