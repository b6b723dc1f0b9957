"""From the bytes of a file to text: byte order marks, what is not UTF-8, and what is too large."""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import DataError

# Characters of a document, some ten million tokens. Tokenising takes about 150 bytes for each.
MOST_CHARACTERS = 2**25
# Of a line of JSON, where each character of the text may be an escape of six.
_MOST_LINE = 6 * MOST_CHARACTERS
# A longer text in which this share of the characters is none was not written in UTF-8.
_SHARE, _LONG = 0.1, 64

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def read_text(file: Path) -> str:
    """All of a file.

    Raises:
        DataError: it is larger than a document may be.
        OSError: it cannot be read.
    """
    with _open(file) as content:
        text = content.read(MOST_CHARACTERS + 1)
    require_size(text, str(file))
    return text


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line of a file, unpacked if its name ends in .gz.

    Raises:
        DataError: a line is too long to be held in memory.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    with _open(file) as content:
        number = 0
        while line := content.readline(_MOST_LINE + 1):
            number += 1
            if len(line) > _MOST_LINE:
                raise DataError(
                    f"{file}, line {number} has more than {_MOST_LINE:,} characters; split it"
                )
            yield number, line


def require_size(text: str, where: str) -> None:
    """Check that a document is not too large to be tokenised.

    Raises:
        DataError: names the place.
    """
    if len(text) > MOST_CHARACTERS:
        raise DataError(
            f"{where} has more than {MOST_CHARACTERS:,} characters in one document; split it"
        )


def clean(text: str, where: str) -> str:
    """`text` without what no tokenizer takes: halves of characters become U+FFFD.

    Raises:
        DataError: a good part of it is no text, such as UTF-16 without its mark, or binary data.
    """
    text = _SURROGATES.sub("\ufffd", text)
    bad = text.count("\0") + text.count("\ufffd")
    if len(text) >= _LONG and bad > _SHARE * len(text):
        raise DataError(
            f"{where} is not text in UTF-8: {bad:,} of {len(text):,} characters cannot be read;"
            " convert it first, for instance with iconv"
        )
    return text


def _open(file: Path) -> IO[str]:
    """The text of a file, in the encoding that its byte order mark names, or else UTF-8."""
    opener: Any = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rb") as content:
        head = content.read(4)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    text: IO[str] = opener(file, "rt", encoding=encoding, errors="replace")
    return text
