"""Perplexity of the first tokens of a text in llama.cpp, by length.

    pip install cyllama
    python -m benchmarks.gguf_perplexity model.gguf [--data TEXT] [--tokenizer smollm2]
        [--lengths 8192,16384] [--threads 2]

The first document is read once, in one context of the longest length; each line is the mean over
the tokens up to that length, and is printed when they have been read. cyllama is the binding with
logits of all tokens; `clex export --verify` compares distributions through xllamacpp, which clex
installs as an extra.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import numpy as np
from cyllama.llama import llama_cpp

from clex.data import find_files, read_documents
from clex.hf.models import assets_folder, load_tokenizer

BATCH = 512


def token_losses(
    path: str, ids: list[int], vocabulary: int, length: int, threads: int
) -> Iterator[float]:
    """Loss of every token of `ids` but the first, nats, given all before it, as they are read.

    Args:
        path: a GGUF file.
        ids: tokens, `length` of them.
        vocabulary: rows of the model's output head.
        length: context of the engine, tokens.
        threads: of the engine.
    """

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        # The binding shapes its logits by this, and does not fill it in for every file.
        n_vocab = vocabulary

    model = Model(path, llama_cpp.LlamaModelParams(), verbose=False)
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = length, BATCH, BATCH
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.LlamaContext(model, settings, verbose=False)
    for start in range(0, length, BATCH):
        part = ids[start : start + BATCH]
        batch = llama_cpp.LlamaBatch(n_tokens=BATCH, embd=0, n_seq_max=1)
        for offset, token in enumerate(part):
            batch.add(token, start + offset, [0], True)
        context.decode(batch)
        for offset in range(len(part)):
            if start + offset + 1 == length:
                return
            logits = np.asarray(context.get_logits_ith(offset), dtype=np.float64)
            top = logits.max()
            total = math.log(np.exp(logits - top).sum()) + top
            yield total - logits[ids[start + offset + 1]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default=str(assets_folder() / "books" / "test.jsonl.gz"))
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[8192, 16384]
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tokenizer, longest = load_tokenizer(args.tokenizer), max(args.lengths)
    text = next(read_documents(find_files(args.data)))
    ids = tokenizer(text, verbose=False)["input_ids"][:longest]
    if len(ids) < longest:
        parser.error(f"the first document has {len(ids)} tokens, fewer than {longest}")
    started = time.perf_counter()
    losses = token_losses(args.model, ids, len(tokenizer), longest, args.threads)
    print(f"| tokens | perplexity of {args.model} | seconds, {args.threads} threads |")
    print("| ---: | ---: | ---: |")
    total = 0.0
    for read, loss in enumerate(losses, start=1):
        total += loss
        if read + 1 in args.lengths:
            passed = time.perf_counter() - started
            print(f"| {read + 1:,} | {math.exp(total / read):.2f} | {passed:.0f} |", flush=True)


if __name__ == "__main__":
    main()
