"""Train the two small language models that the package ships: `tiny-llama` and `tiny-neox`.

The real thing, on one GPU (`training.json` beside each model says how long it took):

    python scripts/train_tiny.py tokenizer --train train.jsonl.gz --out build/tokenizer
    python scripts/train_tiny.py pack --tokenizer build/tokenizer --data train.jsonl.gz \
        --out build/train.npz
    python scripts/train_tiny.py pack --tokenizer build/tokenizer --data val.jsonl.gz \
        --out build/val.npz
    python scripts/train_tiny.py model --family llama --tokenizer build/tokenizer --compile \
        --train build/train.npz --val build/val.npz --out src/clex/assets/tiny-llama
    python scripts/train_tiny.py model --family neox --tokenizer build/tokenizer --compile \
        --train build/train.npz --val build/val.npz --out src/clex/assets/tiny-neox
    python scripts/train_tiny.py evaluate --model src/clex/assets/tiny-llama --val build/val.npz

A CPU-sized run of the same path, in under a minute (its model is useless):

    python scripts/train_tiny.py model --family llama --tokenizer build/tokenizer \
        --train build/val.npz --val build/val.npz --out build/smoke-llama \
        --tokens 40960 --batch 8 --eval-windows 64

`--train`, `--val` and `--data` take JSON Lines (.jsonl or .jsonl.gz, the text in the field `text`);
`--train` and `--val` also take what `pack` writes: the same documents, tokenised (.npz).
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import json
import math
import os
import platform
import random
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
)

WINDOW = 256  # tokens: the context window the models are trained on
STRIDE = 128  # tokens by which evaluation windows advance
VOCAB = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MAX_WEIGHTS_BYTES = 16_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


# --- Tokenizer ------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """The texts of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines if line.strip()]


def sample_paragraphs(documents: list[str], characters: int | None, seed: int) -> Iterator[str]:
    """Paragraphs in random order until `characters` are given out; all of them when None."""
    paragraphs = [part + "\n\n" for text in documents for part in text.split("\n\n") if part]
    random.Random(seed).shuffle(paragraphs)
    given = 0
    for paragraph in paragraphs:
        if characters is not None and given >= characters:
            return
        given += len(paragraph)
        yield paragraph


def train_tokenizer(documents: list[str], out: Path, characters: int | None, seed: int) -> None:
    """Train a byte-level BPE of `VOCAB` entries and save it as a transformers fast tokenizer.

    There is no normaliser and no prefix space, so decoding gives back the exact bytes; and no
    post-processor, so encoding adds no special tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sample_paragraphs(documents, characters, seed), trainer)
    if bpe.get_vocab_size() != VOCAB or bpe.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise SystemExit(f"the text gave {bpe.get_vocab_size()} entries, not {VOCAB}")

    out.mkdir(parents=True, exist_ok=True)
    bpe.save(str(out / "tokenizer.json"))
    # Written by hand: what save_pretrained puts here differs between transformers versions.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": WINDOW,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The vocabulary in the order of ids, in the byte-level alphabet."""
    by_token = tokenizer.get_vocab()
    return sorted(by_token, key=by_token.__getitem__)


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256("\n".join(vocabulary(tokenizer)).encode("utf-8")).hexdigest()


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each id stands for, uint8 [vocab]. Special tokens stand for none."""
    # The byte-level alphabet writes every byte as one character.
    lengths = [0 if token == END_OF_TEXT else len(token) for token in vocabulary(tokenizer)]
    return np.array(lengths, dtype=np.uint8)


# --- Tokenised documents --------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, end to end, with nothing between them."""

    tokens: np.ndarray  # uint16 [total tokens]
    lengths: np.ndarray  # int64 [documents], tokens of each
    characters: np.ndarray  # int64 [documents]
    vocabulary_sha256: str

    def describe(self, path: Path) -> dict[str, Any]:
        return {
            "file": path.name,
            "documents": len(self.lengths),
            "characters": int(self.characters.sum()),
            "tokens": int(self.lengths.sum()),
        }


def tokenise(documents: list[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenise without special tokens, and check that no byte of any document was lost."""
    token_bytes = bytes_per_token(tokenizer)
    parts = []
    for text in documents:
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.uint16)
        if int(token_bytes[ids].sum(dtype=np.int64)) != len(text.encode("utf-8")):
            raise SystemExit("the tokens of a document do not add up to its bytes")
        parts.append(ids)
    return Corpus(
        tokens=np.concatenate(parts),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        characters=np.array([len(text) for text in documents], dtype=np.int64),
        vocabulary_sha256=vocabulary_hash(tokenizer),
    )


def write_packed(corpus: Corpus, path: Path) -> None:
    """Write a .npz whose members are LZMA-compressed; `np.load` reads it like any other."""
    members = {
        "tokens": corpus.tokens,
        "lengths": corpus.lengths,
        "characters": corpus.characters,
        "vocabulary_sha256": np.array(corpus.vocabulary_sha256),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # np.savez_compressed uses deflate, which makes the token stream a third larger.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_corpus(path: Path, tokenizer: Tokenizer) -> Corpus:
    """Read .npz as `pack` wrote it, or read and tokenise JSON Lines."""
    if path.suffix != ".npz":
        return tokenise(read_documents(path), tokenizer)
    with np.load(path) as archive:
        corpus = Corpus(
            tokens=archive["tokens"],
            lengths=archive["lengths"],
            characters=archive["characters"],
            vocabulary_sha256=str(archive["vocabulary_sha256"]),
        )
    if corpus.vocabulary_sha256 != vocabulary_hash(tokenizer):
        raise SystemExit(f"{path} was packed with another tokenizer")
    return corpus


# --- Models ---------------------------------------------------------------------------------------


def model_config(family: str) -> LlamaConfig | GPTNeoXConfig:
    """The configuration of one of the two shipped models, about 5.8 million parameters each."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
    }
    if family == "llama":
        # What length extrapolation has to mend are the rotary dimensions that turn less than once
        # inside the training window: beyond it they show angles never seen. Real models have about
        # 40 % of them (SmolLM2, theta 1e5 and window 8192: 12 of 32 frequencies). The usual theta
        # of 10,000 would make it 19 of 32 at a window of 256; theta 500 gives 12 of 32 again.
        rope = {"rope_type": "default", "rope_theta": 500.0}
        return LlamaConfig(
            **shared, intermediate_size=688, num_key_value_heads=4, rope_parameters=rope
        )
    # Half of each head is rotated, so there are 16 frequencies. Another theta on purpose, so that
    # nothing gets tuned to one: 8 of the 16 turn less than once inside the window.
    rope = {"rope_type": "default", "rope_theta": 2000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXConfig(**shared, intermediate_size=1024, rope_parameters=rope)


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention without a mask; [batch, heads, time, head dim] in, time before heads out.

    The library's "sdpa" looks for packed sequences first: run eagerly that waits for the GPU in
    every step, and compiled it builds a mask, which shuts out the flash kernel. Training windows
    are neither packed nor padded, and for a custom function no mask is made.
    """
    if attention_mask is not None or dropout:
        raise ValueError("causal_attention takes neither a mask nor dropout")
    # The rotation leaves queries and keys in float32 under autocast; values are already bfloat16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def check_rope(model: Any) -> None:
    """Stop unless the rotary frequencies are those that the configuration asks for.

    Configuration keys that a transformers version does not know are ignored without a word.
    """
    config = model.config
    body = model.model if config.model_type == "llama" else model.gpt_neox
    rope = config.rope_parameters
    head = config.hidden_size // config.num_attention_heads
    rotary = int(head * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotary, 2, dtype=torch.float64) / rotary
    expected = rope["rope_theta"] ** -exponents
    actual = body.rotary_emb.inv_freq.double().cpu()
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-5):
        raise SystemExit(f"the rotary frequencies are {actual.tolist()}")


# --- Training -------------------------------------------------------------------------------------


class WindowSampler:
    """Draws windows of consecutive tokens uniformly from all that lie inside one document.

    Everything stays on the device: drawing a batch makes no host synchronisation.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, device: torch.device) -> None:
        lengths = torch.from_numpy(corpus.lengths)
        starts = (lengths - length + 1).clamp(min=0)  # window starts that each document has
        self.total = int(starts.sum())
        if self.total == 0:
            raise SystemExit(f"no training document has {length} tokens")
        # The k-th window start of the corpus belongs to the first document whose `ends` is over k;
        # adding that document's `shift` turns k into a position in `tokens`.
        self.ends = starts.cumsum(0).to(device)
        self.shift = ((lengths.cumsum(0) - lengths) - (starts.cumsum(0) - starts)).to(device)
        self.tokens = torch.from_numpy(corpus.tokens.astype(np.int32)).to(device)
        self.offsets = torch.arange(length, device=device)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def draw(self, batch: int) -> torch.Tensor:
        """Token ids, int64 [batch, length]."""
        k = torch.randint(self.total, (batch,), generator=self.generator, device=self.tokens.device)
        first = k + self.shift[torch.searchsorted(self.ends, k, right=True)]
        return self.tokens[first[:, None] + self.offsets].long()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a fiftieth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: torch.nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves gains and biases alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast on CUDA; plain float32 elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def train(
    model: Any, sampler: WindowSampler, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Train in place; returns steps, tokens, the final training loss (nats a token) and seconds.

    A step sees `args.batch` sequences of exactly `WINDOW` tokens. Each window is drawn one token
    longer than that, so that every one of the `WINDOW` positions has a next token to predict.
    """

    def loss_of(window: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    optimizer = make_optimizer(model, device)
    tokens_per_step = args.batch * WINDOW
    steps = math.ceil(args.tokens / tokens_per_step)
    warmup = max(1, min(200, steps // 10))
    print(
        f"{steps} steps of {args.batch} x {WINDOW} tokens, warm-up {warmup}, peak lr {args.lr}",
        flush=True,
    )

    model.train()
    losses = torch.zeros(steps, device=device)  # stays on the device; read every `log_every` steps
    began = mark = time.perf_counter()
    for step in range(steps):
        lr = learning_rate(step, steps, args.lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        window = sampler.draw(args.batch)
        with mixed_precision(device):
            loss = step_loss(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            since = (step // args.log_every) * args.log_every
            mean = losses[since:done].mean().item()
            now = time.perf_counter()
            rate = (done - since) * tokens_per_step / (now - mark)
            mark = now
            print(
                f"step {done:>6}/{steps}  loss {mean:.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit("the training loss is not finite")
    tail = losses[-min(100, steps) :]
    return {
        "steps": steps,
        "tokens_seen": steps * tokens_per_step,
        "batch_sequences": args.batch,
        "sequence_tokens": WINDOW,
        "peak_learning_rate": args.lr,
        "warmup_steps": warmup,
        "final_train_loss_nats_per_token": tail.mean().item(),
        "final_train_loss_is_the_mean_of_steps": len(tail),
        "train_seconds": time.perf_counter() - began,
    }


# --- Evaluation -----------------------------------------------------------------------------------


def evaluation_windows(lengths: np.ndarray) -> np.ndarray:
    """Windows that score every token but each document's first exactly once, int64 [windows, 4].

    Columns: first token of the window, first scored token, end of the scored tokens, end of the
    document; all are positions in the corpus. Windows advance by `STRIDE`. A document's first
    window scores all of its tokens but the first, which has no context; a later one scores its last
    `WINDOW - STRIDE`, so that these are predicted from at least `STRIDE` tokens.
    """
    rows = []
    begin = 0
    for length in lengths.tolist():
        end = begin + length
        scored = begin + 1
        start = begin
        while scored < end:
            stop = min(start + WINDOW, end)
            rows.append((start, scored, stop, end))
            scored = stop
            start += STRIDE
        begin = end
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


@torch.no_grad()
def evaluate(
    model: Any,
    corpus: Corpus,
    token_bytes: np.ndarray,
    device: torch.device,
    batch: int = 128,
    max_windows: int | None = None,
) -> dict[str, Any]:
    """Loss in nats a token and in bits a UTF-8 byte.

    bits per byte = total nats / ln 2 / total UTF-8 bytes of the scored tokens. Which tokens are
    scored, and from what context, `evaluation_windows` says. `token_bytes` is uint8 [vocab].
    `max_windows` scores that many, evenly spread, instead of all: for trials on a CPU.
    """
    rows = torch.from_numpy(evaluation_windows(corpus.lengths))
    available = len(rows)
    if max_windows is not None and max_windows < available:
        rows = rows[torch.linspace(0, available - 1, max_windows).long()]
    tokens = torch.from_numpy(corpus.tokens.astype(np.int32)).to(device)
    widths = torch.from_numpy(token_bytes.astype(np.int64)).to(device)
    offsets = torch.arange(WINDOW, device=device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    size = torch.zeros((), dtype=torch.int64, device=device)

    model.eval()
    for part in rows.to(device).split(batch):
        start, scored, stop, end = (column[:, None] for column in part.unbind(1))
        position = start + offsets  # [batch, WINDOW]
        # A document's last window may be short. Its padding comes after every scored token, where
        # a causal model cannot see it.
        ids = tokens[position.minimum(end - 1)].long()
        mask = (position >= scored) & (position < stop)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        target, mask = ids[:, 1:], mask[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        nats += (loss.view_as(mask).double() * mask).sum()
        count += mask.sum()
        size += (widths[target] * mask).sum()

    total_nats, total_tokens, total_bytes = nats.item(), int(count), int(size)
    return {
        "nats_per_token": total_nats / total_tokens,
        "bits_per_byte": total_nats / math.log(2) / total_bytes,
        "scored_tokens": total_tokens,
        "scored_bytes": total_bytes,
        "windows": len(rows),
        "windows_available": available,
        "rule": (
            f"windows of {WINDOW} tokens inside one document, stride {STRIDE}; every token but the "
            "first of each document is scored once, from the tokens before it in its window; "
            "float32 arithmetic"
        ),
    }


def evaluate_folder(
    folder: Path, corpus: Corpus, device: torch.device, batch: int, max_windows: int | None
) -> dict[str, Any]:
    """Evaluate a saved model in float32 arithmetic."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    check_rope(model)
    token_bytes = bytes_per_token(load_tokenizer(folder))
    return evaluate(model, corpus, token_bytes, device, batch, max_windows)


# --- Writing the result ---------------------------------------------------------------------------

MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {family} language model of {parameters:.1f} million parameters with a context window of
{window} tokens, trained from random initialisation. It is made for trying and testing context
extension, and small enough to fine-tune on a laptop. It is not meant for writing text that anyone
relies on.

- Layers {layers}, width {hidden}, heads {heads}, vocabulary {vocab}, tied embeddings
- RoPE: {rope}
- Tokenizer: byte-level BPE trained on the same text. Encoding adds no special token, and
  `{end_of_text}` never occurred in training.
- Data: {data}
  ({documents} documents, {characters:,} characters, {tokens:,} tokens)
- Training: {tokens_seen:,} tokens seen in {steps:,} steps, {train_seconds:.0f} s on {hardware}
- Final training loss: {train_loss:.4f} nats per token
- Validation, {val_documents} unseen documents of the same kind: {val_nats:.4f} nats per token,
  {val_bpb:.4f} bits per byte
- How validation is scored: {rule}

The numbers are read from `training.json`. `scripts/train_tiny.py` made this folder.

Weights: Apache-2.0. The training text is in the public domain. The books are old, and the model
repeats the attitudes of their time.
"""


def model_card(name: str, config: Any, record: dict[str, Any]) -> str:
    validation, training = record["validation"], record["training"]
    return MODEL_CARD.format(
        name=name,
        family={"llama": "LLaMA-architecture", "gpt_neox": "GPT-NeoX-architecture"}[
            config.model_type
        ],
        parameters=record["parameters"] / 1e6,
        window=WINDOW,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        rope=", ".join(f"{key} {value}" for key, value in config.rope_parameters.items()),
        end_of_text=END_OF_TEXT,
        data=record["data"]["description"],
        documents=record["data"]["train"]["documents"],
        characters=record["data"]["train"]["characters"],
        tokens=record["data"]["train"]["tokens"],
        tokens_seen=training["tokens_seen"],
        steps=training["steps"],
        train_seconds=training["train_seconds"],
        hardware=record["hardware"],
        train_loss=training["final_train_loss_nats_per_token"],
        val_documents=record["data"]["validation"]["documents"],
        val_nats=validation["nats_per_token"],
        val_bpb=validation["bits_per_byte"],
        rule=validation["rule"],
    )


def command_line(argv: list[str]) -> str:
    """The command that was run, with folders cut off: they differ between machines."""
    words = [Path(word).name if "/" in word else word for word in argv]
    return shlex.join(["python", "scripts/train_tiny.py", *words])


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def check_saved(folder: Path, source: Path) -> None:
    """Stop unless the folder loads with the Auto classes and is as small as promised."""
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise SystemExit(f"the weights take {size:,} bytes, more than {MAX_WEIGHTS_BYTES:,}")
    text = '"It\'s no use," said Emma;\n\nthe café  closed -- at 10.45 o\u2019clock.'
    auto = AutoTokenizer.from_pretrained(folder)
    ids = auto(text)["input_ids"]
    # AutoTokenizer may rebuild a tokenizer by its model type; that one must not be another.
    if ids != load_tokenizer(source).encode(text).ids or auto.decode(ids) != text:
        raise SystemExit("AutoTokenizer does not load the tokenizer that the model was trained on")


# --- Commands -------------------------------------------------------------------------------------


def run_tokenizer(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    documents = read_documents(args.train)
    train_tokenizer(documents, args.out, args.characters, args.seed)
    auto = AutoTokenizer.from_pretrained(args.out)
    print(f"{len(auto)} entries in {time.perf_counter() - began:.0f} s: {args.out}")


def run_pack(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    corpus = tokenise(read_documents(args.data), load_tokenizer(args.tokenizer))
    write_packed(corpus, args.out)
    size = args.out.stat().st_size
    print(f"{corpus.describe(args.data)} in {time.perf_counter() - began:.0f} s: {size:,} bytes")


def run_model(args: argparse.Namespace, argv: list[str]) -> None:
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    if args.out.exists():
        raise SystemExit(f"{args.out} is already there")
    tokenizer = load_tokenizer(args.tokenizer)
    train_corpus = load_corpus(args.train, tokenizer)
    val_corpus = load_corpus(args.val, tokenizer)
    print(f"train {train_corpus.describe(args.train)}")
    print(f"validation {val_corpus.describe(args.val)}")

    config = model_config(args.family)
    AttentionInterface.register("causal_attention", causal_attention)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="causal_attention"
    ).to(device)
    check_rope(model)
    parameters = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if not tied:
        raise SystemExit("this transformers version did not tie the embeddings")
    print(f"{args.family}: {parameters:,} parameters", flush=True)

    began = time.perf_counter()
    sampler = WindowSampler(train_corpus, WINDOW + 1, args.seed, device)
    training = train(model, sampler, args, device)

    # A folder appears under its final name only when everything in it has been written and read.
    staged = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(staged)
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.tokenizer / name, staged / name)
    for path in staged.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    check_saved(staged, args.tokenizer)

    # Evaluated from the saved bfloat16 weights: the number belongs to what is shipped.
    validation = evaluate_folder(staged, val_corpus, device, args.eval_batch, args.eval_windows)
    print(
        f"validation: {validation['nats_per_token']:.4f} nats/token, "
        f"{validation['bits_per_byte']:.4f} bits/byte",
        flush=True,
    )
    record = {
        "command": command_line(argv),
        "family": args.family,
        "parameters": parameters,
        "data": {
            "description": args.data_description,
            "train": train_corpus.describe(args.train),
            "validation": val_corpus.describe(args.val),
        },
        "seed": args.seed,
        "training": training,
        "validation": validation,
        "hardware": hardware_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "seconds": time.perf_counter() - began,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    (staged / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (staged / "README.md").write_text(model_card(args.out.name, config, record), "utf-8")
    staged.rename(args.out)
    print(f"wrote {args.out} in {record['seconds']:.0f} s")


def run_evaluate(args: argparse.Namespace) -> None:
    corpus = load_corpus(args.val, load_tokenizer(args.model))
    device = torch.device(args.device)
    result = evaluate_folder(args.model, corpus, device, args.eval_batch, args.eval_windows)
    print(json.dumps(result, indent=2))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="subcommand", required=True)

    tokenizer = commands.add_parser("tokenizer", help="train the byte-level BPE")
    tokenizer.add_argument("--train", type=Path, required=True)
    tokenizer.add_argument("--out", type=Path, required=True)
    tokenizer.add_argument("--characters", type=int, help="train on a sample (default: all)")
    tokenizer.add_argument("--seed", type=int, default=0)

    pack = commands.add_parser("pack", help="tokenise documents into a small .npz")
    pack.add_argument("--tokenizer", type=Path, required=True)
    pack.add_argument("--data", type=Path, required=True)
    pack.add_argument("--out", type=Path, required=True)

    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    model = commands.add_parser("model", help="train one of the two models")
    model.add_argument("--family", choices=("llama", "neox"), required=True)
    model.add_argument("--tokenizer", type=Path, required=True)
    model.add_argument("--train", type=Path, required=True)
    model.add_argument("--val", type=Path, required=True)
    model.add_argument("--out", type=Path, required=True)
    model.add_argument("--tokens", type=int, default=300_000_000, help="tokens seen in all")
    # 65,536 tokens a step: big matrices for the GPU, and still some 4,600 steps.
    model.add_argument("--batch", type=int, default=256, help="sequences a step")
    model.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--compile", action="store_true")
    model.add_argument("--log-every", type=int, default=100, help="steps")
    model.add_argument(
        "--data-description",
        default="English books in the public domain, first published in 1928 or earlier",
    )
    evaluation = commands.add_parser("evaluate", help="validation loss of a saved model")
    evaluation.add_argument("--model", type=Path, required=True)
    evaluation.add_argument("--val", type=Path, required=True)
    for command in (model, evaluation):
        command.add_argument("--device", default=default_device)
        command.add_argument("--eval-batch", type=int, default=128, help="windows at a time")
        command.add_argument("--eval-windows", type=int, help="score only so many (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.subcommand == "tokenizer":
        run_tokenizer(args)
    elif args.subcommand == "pack":
        run_pack(args)
    elif args.subcommand == "model":
        run_model(args, argv)
    else:
        run_evaluate(args)


if __name__ == "__main__":
    main()
