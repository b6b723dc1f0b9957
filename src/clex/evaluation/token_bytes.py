"""Bytes of text that each token stands for, so that models with different tokenizers compare."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_bytes(tokenizer: Any) -> Tensor:
    """UTF-8 bytes of every token of a vocabulary.

    A token's bytes are what it adds when it is decoded after the letter "a": in front of a text
    some tokenizers drop the space that a token carries. A token that is a part of a character
    decodes to a replacement character; there the bytes are counted in its name, a letter for a byte
    in byte-level vocabularies and ``<0xE2>`` for one in those with byte fallback. So the bytes of a
    text are the sum over its tokens, wherever it is cut.

    Returns:
        int64 (V,), V the largest token number + 1; 0 for numbers that are no token. A tokenizer
        that normalises (lower case, NFKC) is counted by what it makes of the text.
    """
    vocabulary = tokenizer.get_vocab()
    result = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    before = tokenizer("a", add_special_tokens=False)["input_ids"]

    def decode(rows: list[list[int]]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(
            rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return texts

    skipped = len(decode([before])[0].encode())
    names = sorted(vocabulary.items(), key=lambda item: item[1])
    for (name, number), text in zip(names, decode([[*before, n] for _, n in names]), strict=True):
        if _BYTE_FALLBACK.fullmatch(name):
            result[number] = 1
        elif _REPLACEMENT in text:
            # The character itself may be in the vocabulary, three bytes long in either reading.
            result[number] = len(name)
        else:
            result[number] = len(text.encode()) - skipped
    return result
