"""A checkpoint of transformers as a GGUF file of arch llama, in a float type."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..files import read_json
from .fixed import FixedScale
from .gguf_file import (
    Field,
    GgufTensor,
    factors_tensor,
    require_gguf,
    scale_fields,
    write_gguf,
)

ARCH = "llama"
QUANTIZER = "llama-quantize"
FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_WAY_ROUND = "convert it with llama.cpp's convert_hf_to_gguf.py and pass that file as --gguf"


def convert_gguf(
    model: nn.Module,
    folder: Path,
    path: Path,
    fixed: FixedScale,
    *,
    name: str,
    console: Console | None = None,
) -> None:
    """Write a plain model whose queries are scaled already.

    Args:
        model: plain, weights merged, in the dtype that the file shall have; vectors become F32.
        folder: holds its tokenizer.json and the like.
        path: the new file.
        fixed: the scale.
        name: general.name.
        console: where a bar goes.

    Raises:
        UnsupportedModelError: a tensor or the tokenizer has no counterpart that is known to agree.
    """
    require_gguf()
    fields = [
        *_model_fields(model, fixed, name),
        *_tokenizer_fields(folder, model),
        *scale_fields(fixed, ARCH),
    ]
    tensors = [factors_tensor(fixed), *_tensors(model)]
    write_gguf(path, ARCH, fields, tensors, console=console)


def require_quantizer() -> str:
    """Where llama.cpp's own quantiser is.

    Raises:
        ConfigError: it is not installed.
    """
    found = shutil.which(QUANTIZER)
    if found is None:
        raise ConfigError(
            f"--quantize needs {QUANTIZER} of llama.cpp on the PATH; leave it out for float types,"
            " or pass a quantised file as --gguf"
        )
    return found


def quantize_gguf(source: Path, path: Path, kind: str) -> None:
    """Quantise a file with llama.cpp's own tool, which leaves `rope_freqs` in float32.

    Raises:
        ConfigError: the tool is not installed.
        CheckpointError: it failed.
    """
    done = subprocess.run(
        [require_quantizer(), str(source), str(path), kind], capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise CheckpointError(f"{QUANTIZER} failed for type {kind!r}: {lines[-1]}")


def _model_fields(model: nn.Module, fixed: FixedScale, name: str) -> list[Field]:
    import gguf

    config: Any = model.config
    kinds = gguf.GGUFValueType
    heads = config.num_attention_heads
    file_types = {"F32": 0, "F16": 1, "BF16": 32}
    whole = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": fixed.head_dim,
        "attention.value_length": fixed.head_dim,
        "rope.dimension_count": fixed.rotary_dim,
        "vocab_size": config.vocab_size,
    }
    return [
        Field("general.type", "model", kinds.STRING),
        Field("general.name", name, kinds.STRING),
        Field("general.file_type", file_types[_float_type(model)], kinds.UINT32),
        *(Field(f"{ARCH}.{key}", int(value), kinds.UINT32) for key, value in whole.items()),
        Field(f"{ARCH}.rope.freq_base", fixed.rope_theta, kinds.FLOAT32),
        Field(
            f"{ARCH}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps), kinds.FLOAT32
        ),
    ]


def _float_type(model: nn.Module) -> str:
    return FLOAT_TYPES[next(model.parameters()).dtype]


def _tensors(model: nn.Module) -> list[GgufTensor]:
    import gguf

    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    result = []
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(f"{key} has no place in arch {ARCH}; {_WAY_ROUND}")
        rows = heads if ".q_proj." in key else groups if ".k_proj." in key else 0
        result.append(_tensor(name, tensor, rows))
    return result


def _tensor(name: str, tensor: Tensor, heads: int) -> GgufTensor:
    """As llama.cpp stores it; `heads` is 0 for all but queries and keys."""
    kind = "F32" if tensor.dim() == 1 else FLOAT_TYPES[tensor.dtype]
    wide = kind == "BF16"
    shape = (*tensor.shape[:-1], tensor.shape[-1] * 2) if wide else tuple(tensor.shape)
    dtype = np.uint8 if wide else np.float16 if kind == "F16" else np.float32

    def data() -> Any:
        values = _paired(tensor, heads) if heads else tensor
        if wide:
            return values.contiguous().view(torch.uint8).numpy()
        return values.float().numpy().astype(dtype)

    return GgufTensor(name, shape, kind, dtype, data)


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """From rotary halves, as transformers has them, to the pairs of arch llama."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _tokenizer_fields(folder: Path, model: nn.Module) -> list[Field]:
    """Tokens, merges and special tokens of a byte-level BPE; others are refused."""
    import gguf

    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModelError(f"the model has no tokenizer.json; {_WAY_ROUND}")
    tokenizer = read_json(folder / "tokenizer.json")
    pre = _pre_tokenizer(tokenizer)
    config: Any = model.config
    tokens, types = _tokens(tokenizer, config.vocab_size)
    kinds = gguf.GGUFValueType
    fields = [
        Field("tokenizer.ggml.model", "gpt2", kinds.STRING),
        Field("tokenizer.ggml.pre", pre, kinds.STRING),
        Field("tokenizer.ggml.tokens", tokens, kinds.ARRAY, kinds.STRING),
        Field("tokenizer.ggml.token_type", types, kinds.ARRAY, kinds.INT32),
        Field("tokenizer.ggml.add_bos_token", _adds_bos(tokenizer), kinds.BOOL),
    ]
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
    if special.merges:
        fields.append(Field("tokenizer.ggml.merges", special.merges, kinds.ARRAY, kinds.STRING))
    ids = {
        "bos": config.bos_token_id,
        "eos": config.eos_token_id,
        "pad": config.pad_token_id,
        **special.special_token_ids,
    }
    names = {"pad": "padding", "unk": "unknown", "sep": "seperator"}  # their spelling
    for key, value in ids.items():
        value = value[0] if isinstance(value, list) else value
        if value is not None and key in ("bos", "eos", "pad", "unk", "eot", "eom"):
            name = f"tokenizer.ggml.{names.get(key, key)}_token_id"
            fields.append(Field(name, int(value), kinds.UINT32))
    template = special.chat_template
    if isinstance(template, str):
        fields.append(Field("tokenizer.chat_template", template, kinds.STRING))
    return fields


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how the text is cut before the merges.

    Raises:
        UnsupportedModelError: it has another form than those whose name is known.
    """
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    parts = tokenizer.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts]) if parts.get("type") == "Sequence" else [parts]
    shape = [part.get("type") for part in parts]
    plain = model.get("type") == "BPE" and not model.get("byte_fallback")
    last = parts[-1]
    if plain and shape[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        words = last.get("use_regex", True)
        if shape == ["ByteLevel"] and words and normalizer is None:
            return "gpt-2"
        digits = shape == ["Digits", "ByteLevel"] and parts[0].get("individual_digits")
        if digits and words and normalizer is None:
            return "smollm"
        split = parts[0].get("pattern", {}).get("Regex") if shape[0] == "Split" else None
        if len(shape) == 2 and not words:
            if split == _LLAMA3_SPLIT and normalizer is None:
                return "llama-bpe"
            if split == _QWEN2_SPLIT and normalizer in (None, {"type": "NFC"}):
                return "qwen2"
    raise UnsupportedModelError(
        f"its tokenizer ({model.get('type')}, cut by {', '.join(map(str, shape))}) is none whose"
        f" name in llama.cpp is known here; {_WAY_ROUND}"
    )


def _adds_bos(tokenizer: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts a token before the text."""
    processor = tokenizer.get("post_processor") or {}
    processors = processor.get("processors", [processor])
    return any(
        part.get("type") == "TemplateProcessing"
        and part.get("single", [])
        and "SpecialToken" in part["single"][0]
        for part in processors
    )


def _tokens(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token; ids that the tokenizer does not use get a name of their own."""
    import gguf

    types = gguf.TokenType
    by_id = {i: (text, types.NORMAL) for text, i in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens") or []:
        kind = types.CONTROL if added.get("special") else types.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    if max(by_id) >= vocab_size:
        raise UnsupportedModelError(
            f"the tokenizer has token {max(by_id)} and the model only {vocab_size}; {_WAY_ROUND}"
        )
    rows = [by_id.get(i, (f"[PAD{i}]", types.UNUSED)) for i in range(vocab_size)]
    return [text for text, _ in rows], [int(kind) for _, kind in rows]
