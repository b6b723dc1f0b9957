"""Tiny random models, tokens and files, made in milliseconds and never downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from clex.hf.extend import require_extension

NATIVE = 64
VOCAB = 128
# Larger weights than the usual 0.02: at hidden size 64 attention would otherwise be all but flat,
# and no logit would notice where a token stands.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": NATIVE,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}

# The families that issue and documentation name: config class and its settings.
FAMILIES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, GROUPED),
    "mistral": (transformers.MistralConfig, {**GROUPED, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, GROUPED),
    "qwen3": (transformers.Qwen3Config, {**GROUPED, "head_dim": 16}),
    "phi3": (transformers.Phi3Config, GROUPED),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {
            **SIZES,
            # Half of each head is rotated.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}


def make_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random model in evaluation mode; the same seed gives the same weights."""
    config_type, settings = FAMILIES[family]
    return build(config_type(**{**settings, **changes}), seed, dtype)


def build(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of any config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_ids(rows: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Random tokens (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (rows, length), generator=generator)


def make_tokens(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> datasets.Dataset:
    """Documents of random tokens, as `clex.data.load_tokens` returns them."""
    rows = [make_ids(1, n, seed + i, vocab)[0].tolist() for i, n in enumerate(lengths)]
    return datasets.Dataset.from_dict({"input_ids": rows, "length": list(lengths)})


def stir(model: nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Random numbers in all that an untrained extension has at zero, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in require_extension(model).scalings.parameters():
            if not parameter.any():
                parameter.normal_(std=std, generator=generator)


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of a plain forward pass without a cache."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return result


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte: 256 of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model with its tokenizer, as a folder that the command line takes."""
    make_model(family, vocab_size=256, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_documents(path: Path, lengths: Sequence[int]) -> Path:
    """A .jsonl file of documents with so many letters (and bytes, and tokens) each."""
    words = "the sea was calm and the old ship lay in the bay until the wind came up "
    with path.open("w", encoding="utf-8") as file:
        for i, n in enumerate(lengths):
            text = (words[i % 7 :] * (n // len(words) + 2))[:n]
            file.write(json.dumps({"text": text}) + "\n")
    return path


@contextmanager
def token_cache(folder: Path) -> Iterator[None]:
    """Keep tables of tokens in `folder`, not among the user's own."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
