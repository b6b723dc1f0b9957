"""Bits per byte of simple compressors and 5-gram models, to set beside the tiny models.

    python scripts/text_baselines.py --tokenizer build/tokenizer \
        --train train.jsonl.gz --val val.jsonl.gz \
        --out benchmarks/results/2026-11-22-cpu-text-baselines.json

A quick run, which also checks that the probabilities sum to one:

    python scripts/text_baselines.py --tokenizer build/tokenizer --check \
        --train val.jsonl.gz --val val.jsonl.gz --train-documents 3 --val-documents 1

Four rows, all on the same validation text that `train_tiny.py` measures on:

- xz of the validation text alone, as one file (preset 9, as `xz -9`);
- xz given training text: size(xz(sample + validation)) - size(xz(sample)), where the sample is the
  last 32 MiB of the training text, so that both fit the 64 MiB dictionary of preset 9;
- a 5-gram model over bytes, and one over the tokens of the tiny models, both with interpolated
  modified Kneser-Ney smoothing (Chen and Goodman, 1999) and counted on the whole training text.

The 5-gram models score every symbol but the first of each document, as the tiny models do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from train_tiny import bytes_per_token, load_tokenizer, read_documents, tokenise

ORDER = 5
SAMPLE_BYTES = 32 * 2**20


# --- xz -------------------------------------------------------------------------------------------


def xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


def xz_rows(train: list[str], val: list[str]) -> list[dict[str, Any]]:
    """The two xz rows. Documents are joined by a blank line."""
    val_bytes = "\n\n".join(val).encode("utf-8")
    sample = "\n\n".join(train).encode("utf-8")[-SAMPLE_BYTES:]
    alone = xz_size(val_bytes)
    given = xz_size(sample + val_bytes) - xz_size(sample)
    return [
        {
            "method": "xz -9, validation text only",
            "bits_per_byte": 8 * alone / len(val_bytes),
            "compressed_bytes": alone,
            "scored_bytes": len(val_bytes),
        },
        {
            "method": f"xz -9, given {len(sample) / 2**20:.0f} MiB of training text",
            "bits_per_byte": 8 * given / len(val_bytes),
            "compressed_bytes": given,
            "scored_bytes": len(val_bytes),
        },
    ]


# --- 5-gram models --------------------------------------------------------------------------------


def pack_ngrams(documents: list[np.ndarray], order: int, bits: int) -> np.ndarray:
    """All n-grams inside the documents as integers, uint64 [total], in the order of the text.

    The oldest symbol takes the highest bits: `key >> bits` is the context and
    `key & (2 ** (bits * (order - 1)) - 1)` the n-gram without its oldest symbol.
    """
    parts = []
    for symbols in documents:
        count = len(symbols) - order + 1
        key = np.zeros(max(count, 0), dtype=np.uint64)
        for offset in range(order if count > 0 else 0):
            key <<= np.uint64(bits)
            key |= symbols[offset : offset + count].astype(np.uint64)
        parts.append(key)
    return np.concatenate(parts)


def count_sorted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs in a sorted array: distinct values, where each begins, how often each occurs."""
    first = np.empty(len(keys), dtype=bool)
    first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    begins = np.flatnonzero(first)
    return keys[begins], begins, np.diff(begins, append=len(keys))


def discounts(counts: np.ndarray) -> np.ndarray:
    """Chen and Goodman's discounts of n-grams counted 0, 1, 2 and 3 or more times, float64 [4]."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:  # too few n-grams to estimate from
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Below 0 or above the count itself the result would be no probability.
    return np.clip(estimate, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])


@dataclass(frozen=True)
class Level:
    """What one order n of the model knows; all arrays sorted by key.

    The probability of w after h is `kept[hw] + backoff[h] * (its probability at order n - 1)`,
    and just that lower probability where h was never seen.
    """

    keys: np.ndarray  # uint64 [distinct n-grams]
    kept: np.ndarray  # float64 [distinct n-grams], (count - discount) / total of the context
    contexts: np.ndarray  # uint64 [distinct contexts]
    backoff: np.ndarray  # float64 [distinct contexts], discounted mass / total of the context


def make_level(keys: np.ndarray, counts: np.ndarray, bits: int) -> Level:
    discount = discounts(counts)[np.minimum(counts, 3)]
    contexts, begins, sizes = count_sorted(keys >> np.uint64(bits))
    totals = np.add.reduceat(counts, begins).astype(np.float64)
    return Level(
        keys=keys,
        kept=(counts - discount) / np.repeat(totals, sizes),
        contexts=contexts,
        backoff=np.add.reduceat(discount, begins) / totals,
    )


@dataclass(frozen=True)
class NGramModel:
    levels: list[Level]  # orders 1 to ORDER
    vocabulary: int
    bits: int

    def extend(self, lower: np.ndarray, keys: np.ndarray, order: int) -> np.ndarray:
        """From probabilities at `order - 1` to those at `order`; both float64, as long as keys."""
        level = self.levels[order - 1]
        at = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
        kept = np.where(level.keys[at] == keys, level.kept[at], 0.0)
        context = keys >> np.uint64(self.bits)
        at = np.minimum(np.searchsorted(level.contexts, context), len(level.contexts) - 1)
        seen = level.contexts[at] == context
        return np.where(seen, kept + level.backoff[at] * lower, lower)

    def probability(self, context: np.ndarray) -> np.ndarray:
        """Of every symbol after up to ORDER - 1 symbols of context, float64 [vocabulary]."""
        words = np.arange(self.vocabulary, dtype=np.uint64)
        p = np.full(self.vocabulary, 1.0 / self.vocabulary)
        for order in range(1, min(ORDER, len(context) + 1) + 1):
            high = 0
            for symbol in context[len(context) - order + 1 :].tolist():
                high = (high << self.bits) | symbol
            p = self.extend(p, np.uint64(high << self.bits) | words, order)
        return p

    def nats(self, symbols: np.ndarray) -> float:
        """Negative log-likelihood of all symbols of one document but the first."""
        p = np.full(len(symbols), 1.0 / self.vocabulary)
        for order in range(1, min(ORDER, len(symbols)) + 1):
            keys = pack_ngrams([symbols], order, self.bits)
            # Sorted queries walk through the sorted tables once instead of jumping about in them.
            distinct, back = np.unique(keys, return_inverse=True)
            if order == 1:
                p = self.extend(np.full(len(distinct), p[0]), distinct, 1)[back]
                continue
            # One n-gram has one lower-order probability, whichever of its occurrences gives it.
            lower = np.empty(len(distinct))
            lower[back] = p[order - 1 :]
            p[order - 1 :] = self.extend(lower, distinct, order)[back]
        return float(-np.log(p[1:]).sum())


def train_ngrams(documents: list[np.ndarray], vocabulary: int) -> NGramModel:
    """Count all orders: the highest by occurrence, lower ones by distinct preceding symbols."""
    bits = (vocabulary - 1).bit_length()
    if bits * ORDER > 64:
        raise ValueError(f"{ORDER} symbols of {bits} bits do not fit one 64-bit key")
    everything = pack_ngrams(documents, ORDER, bits)
    everything.sort()
    keys, _, counts = count_sorted(everything)
    del everything
    levels = [make_level(keys, counts, bits)]
    for order in range(ORDER - 1, 0, -1):
        suffixes = keys & np.uint64(2 ** (bits * order) - 1)
        suffixes.sort()
        keys, _, counts = count_sorted(suffixes)
        levels.append(make_level(keys, counts, bits))
    return NGramModel(levels[::-1], vocabulary, bits)


def check_sums(model: NGramModel, documents: list[np.ndarray], seed: int = 0) -> float:
    """The largest deviation from one over contexts met, of every length, and contexts made up."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, model.vocabulary, ORDER - 1) for _ in range(20)]
    for symbols in documents[:5]:
        for length in range(ORDER):
            start = int(rng.integers(0, len(symbols) - length))
            contexts.append(symbols[start : start + length])
    return max(abs(float(model.probability(context).sum()) - 1) for context in contexts)


def check_nats(model: NGramModel, symbols: np.ndarray) -> float:
    """Difference between the fast path and one symbol at a time, in nats a symbol."""
    slow = 0.0
    for at in range(1, len(symbols)):
        context = symbols[max(0, at - ORDER + 1) : at]
        slow -= math.log(model.probability(context)[symbols[at]])
    return abs(slow - model.nats(symbols)) / (len(symbols) - 1)


def ngram_row(
    method: str,
    train: list[np.ndarray],
    val: list[np.ndarray],
    widths: np.ndarray,
    check: bool,
) -> dict[str, Any]:
    """Train, check and measure one 5-gram model. `widths` is bytes a symbol, uint8 [vocabulary]."""
    began = time.perf_counter()
    model = train_ngrams(train, len(widths))
    if check:
        sums, nats = check_sums(model, val), check_nats(model, val[0][:500])
        print(f"{method}: sums differ from 1 by {sums:.1e}, fast from slow path by {nats:.1e} nats")
        if sums > 1e-9 or nats > 1e-9:
            raise SystemExit("the model is not a probability distribution")
    nats_total = sum(model.nats(symbols) for symbols in val)
    scored = sum(len(symbols) - 1 for symbols in val)
    scored_bytes = sum(int(widths[symbols[1:]].sum(dtype=np.int64)) for symbols in val)
    return {
        "method": method,
        "bits_per_byte": nats_total / math.log(2) / scored_bytes,
        "nats_per_symbol": nats_total / scored,
        "scored_symbols": scored,
        "scored_bytes": scored_bytes,
        "distinct_5_grams": len(model.levels[-1].keys),
        "smoothing": "interpolated modified Kneser-Ney",
        "seconds": time.perf_counter() - began,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help=".jsonl or .jsonl.gz")
    parser.add_argument("--val", type=Path, required=True, help=".jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--train-documents", type=int, help="use only the first so many")
    parser.add_argument("--val-documents", type=int, help="use only the first so many")
    parser.add_argument("--check", action="store_true", help="check the 5-gram probabilities")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    train = read_documents(args.train)[: args.train_documents]
    val = read_documents(args.val)[: args.val_documents]
    rows = xz_rows(train, val)

    def as_bytes(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    widths = np.ones(256, dtype=np.uint8)
    rows.append(ngram_row("5-gram, bytes", as_bytes(train), as_bytes(val), widths, args.check))

    tokenizer = load_tokenizer(args.tokenizer)

    def as_tokens(texts: list[str]) -> list[np.ndarray]:
        corpus = tokenise(texts, tokenizer)
        return np.split(corpus.tokens, corpus.lengths.cumsum()[:-1])

    widths = bytes_per_token(tokenizer)
    method = f"5-gram, {len(widths)} BPE tokens"
    rows.append(ngram_row(method, as_tokens(train), as_tokens(val), widths, args.check))

    print(f"{'method':<40}  bits/byte")
    for row in rows:
        print(f"{row['method']:<40}  {row['bits_per_byte']:9.4f}")
    if args.out is not None:
        record = {
            "train": {"documents": len(train), "characters": sum(map(len, train))},
            "validation": {"documents": len(val), "characters": sum(map(len, val))},
            "rows": rows,
            "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "seconds": time.perf_counter() - began,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
