"""Pick the demo books that travel with the package.

    python scripts/make_demo_books.py --train books/train.jsonl.gz --test books/test.jsonl.gz

The input files are JSON Lines (optionally gzip-compressed), one book a line, with the fields `id`,
`title`, `author`, `source`, `license` and `text`. Two files are written to `src/clex/assets/books`:
`train.jsonl.gz`, to fine-tune on, and `test.jsonl.gz`, to measure on. The two input files must be
disjoint splits; no test book may have been seen when the shipped tiny models were trained.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

TRAIN_TITLES = (
    "Gulliver's Travels",
    "King Solomon's Mines",
    "Robinson Crusoe",
    "The Invisible Man",
    "The Scarlet Letter",
    "The Wind in the Willows",
    "Three Men in a Boat",
    "Wuthering Heights",
)
TEST_TITLES = (
    "Moby-Dick",
    "Persuasion",
    "The Last of the Mohicans",
    "The Scarlet Pimpernel",
)
FIELDS = ("id", "title", "author", "source", "license", "text")
MAX_COMPRESSED_BYTES = 4_000_000  # the wheel carries both files


def read_books(path: Path) -> list[dict[str, str]]:
    """All records of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def pick(books: list[dict[str, str]], titles: tuple[str, ...]) -> list[dict[str, str]]:
    """The books with these titles, in the order of `titles`, cut down to `FIELDS`."""
    by_title = {book["title"]: book for book in books}
    missing = [title for title in titles if title not in by_title]
    if missing:
        raise SystemExit(f"titles not found: {missing}")
    return [{field: by_title[title][field] for field in FIELDS} for title in titles]


def write_books(books: list[dict[str, str]], path: Path) -> int:
    """Write gzip-compressed JSON Lines and return the number of compressed bytes."""
    text = "".join(json.dumps(book, ensure_ascii=False) + "\n" for book in books)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime=0 keeps the clock out of the gzip header: the same books give the same bytes.
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    return path.stat().st_size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="books of the training split")
    parser.add_argument("--test", type=Path, required=True, help="books of the test split")
    parser.add_argument("--out", type=Path, default=Path("src/clex/assets/books"))
    args = parser.parse_args(argv)

    train = pick(read_books(args.train), TRAIN_TITLES)
    test = pick(read_books(args.test), TEST_TITLES)
    shared = {book["id"] for book in train} & {book["id"] for book in test}
    if shared:
        raise SystemExit(f"books in both splits: {sorted(shared)}")

    total = 0
    for name, books in (("train", train), ("test", test)):
        size = write_books(books, args.out / f"{name}.jsonl.gz")
        total += size
        characters = sum(len(book["text"]) for book in books)
        print(f"{name}: {len(books)} books, {characters:,} characters, {size:,} bytes compressed")
        for book in books:
            print(f"  {len(book['text']):>9,}  {book['title']} - {book['author']}")
    if total > MAX_COMPRESSED_BYTES:
        raise SystemExit(f"{total:,} compressed bytes, more than {MAX_COMPRESSED_BYTES:,}")


if __name__ == "__main__":
    main()
