"""Small models with a tokenizer that llama.cpp takes, and exports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import clex
import tiny
from clex.export import ExportRecord, export

VOCAB = 300
# YaRN brings a temperature of its own: 1.30 on the logits at t = 4.
YARN = clex.ClexConfig(method="yarn", max_scale=8, grid="none")
WORDS = "the sea was calm and the old ship lay in the bay until 1234 winds came up; it's late "

PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

# Families beyond those of tests/tiny.py.
MORE: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma": (transformers.GemmaConfig, {**tiny.GROUPED, "head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {**tiny.GROUPED, "head_dim": 16}),
    "olmo2": (transformers.Olmo2Config, tiny.GROUPED),
    "cohere": (transformers.CohereConfig, tiny.GROUPED),
    "glm": (transformers.GlmConfig, {**tiny.GROUPED, "head_dim": 16, "rope_parameters": PARTIAL}),
    "stablelm": (transformers.StableLmConfig, {**tiny.GROUPED, "rope_parameters": PARTIAL}),
    "phi": (transformers.PhiConfig, {**tiny.GROUPED, "rope_parameters": PARTIAL}),
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with merges, which llama.cpp calls gpt-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def make_model(family: str = "llama", **changes: Any) -> Any:
    """A random model with varied norms and biases, which are all 1 and 0 in a fresh one.

    It has four rows of embeddings that no token of the tokenizer uses, as many models have.
    """
    config_type, settings = {**tiny.FAMILIES, **MORE}[family]
    model = tiny.build(config_type(**{**settings, "vocab_size": VOCAB + 4, **changes}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model with its tokenizer, as a folder."""
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_export(source: Path, out: Path, target: str = "hf", **settings: Any) -> ExportRecord:
    """An export of a plain model at t = 4 under YaRN, 256 tokens."""
    given: dict[str, Any] = {"scale": 4, "clex": YARN, **settings}
    return export(source, out, target=target, **given)  # type: ignore[arg-type]


def make_ids(length: int, seed: int = 0) -> Tensor:
    """Random tokens (1, length)."""
    return tiny.make_ids(1, length, seed, VOCAB)


def log_probs(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Log-probabilities (1, T, vocabulary) of a forward pass without a cache."""
    return tiny.logits(model, ids, **inputs).log_softmax(-1)


def live(source: Path, ids: Tensor, t: float, config: clex.ClexConfig = YARN) -> Tensor:
    """What the live extended model says at scale `t`."""
    model = clex.extend(plain(source), config)
    with clex.at_scale(model, t):
        return log_probs(model, ids)


def plain(folder: Path) -> Any:
    """A folder as transformers alone loads it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference."""
    return float((a - b).abs().max())
