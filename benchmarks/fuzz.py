"""Damaged and hostile files for every reader of clex: how many were tried, and what broke.

    OMP_NUM_THREADS=1 python -m benchmarks.fuzz --seconds 600 --out fuzz.json

Each execution changes a valid file at random, in its bytes or, for JSON and TOML, in its values,
and has it read. Anything but a result or a `ClexError` counts as a crash, and so does an execution
of more than ten seconds, or one that makes the process larger by more than `_MOST_GROWTH`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from rich.console import Console

import clex
from clex.comparison.recipe import parse_recipe, read_recipe
from clex.config import ClexConfig
from clex.data import read_documents
from clex.decoding import MOST_CHARACTERS
from clex.errors import ClexError
from clex.evaluation.scores import ScoreLog, rows_of
from clex.export.fixed import FixedScale, fixed_scale
from clex.export.gguf_copy import copy_gguf
from clex.export.gguf_file import Field, GgufTensor, write_gguf
from clex.export.record import ExportRecord, read_record
from clex.files import write_json
from clex.hf.adapter import load_adapter
from clex.hf.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load
from clex.hf.extend import restore
from clex.scaling import scaling_methods

_SECONDS = 10
_SILENT = Console(file=io.StringIO())
_MOST_GROWTH = 1_500_000  # kilobytes
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        "x",
        "../../x",
        "\0",
        "é" * 300,
        [],
        {},
        [[]],
        {"": 0},
        "nan",
        0,
        1,
        -1,
    ),
    *(0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 2**53, 2**64, -(2**63), 10**30),
    *([1] * 2000, ["clip"] * 2000, {"r": 10**9}, "(a+)+$", "clex", "yarn", "learned", 2.5, 1e6),
)
_NUMBERS = (0, 1, 2**7, 2**8 - 1, 2**16, 2**31, 2**32 - 1, 2**33, 2**48, 2**60, 2**63, 2**64 - 1)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes, numbers or stretches changed, or its end lost."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = rng.randrange(len(out))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            size = rng.choice((4, 8))
            number = rng.choice(_NUMBERS) % 2 ** (8 * size)
            out[at : at + size] = struct.pack("<I" if size == 4 else "<Q", number)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randint(1, 16)]
        else:
            end = min(len(out), at + rng.randint(1, 64))
            out[at:at] = out[at:end] * rng.randint(1, 4)
    return bytes(out)


def change_values(value: Any, rng: random.Random) -> Any:
    """`value` of JSON with one entry changed, lost or added."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(value, dict | list):
        walk(value)
    if not places or rng.random() < 0.02:
        return rng.choice(NASTY)
    node, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0 and isinstance(node, dict):
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("x", "", "r", "method", "../y"))] = rng.choice(NASTY)
    else:
        node[key] = rng.choice(NASTY)
    return value


def _json(value: Any, rng: random.Random) -> bytes:
    """A changed value as a file; now and then with its bytes changed too."""
    data = json.dumps(change_values(value, rng)).encode()
    return change_bytes(data, rng) if rng.random() < 0.3 else data


@dataclass
class Outcome:
    """What came of one reader.

    Attributes:
        name: of the reader.
        executions: files that it was given.
        accepted: those that it read; the others were refused.
        slowest: seconds of one execution.
        crashes: the first lines of whatever was no `ClexError`, with the file in hexadecimal.
    """

    name: str
    executions: int = 0
    accepted: int = 0
    slowest: float = 0.0
    crashes: list[str] = field(default_factory=list)


class Inputs:
    """Valid files to begin with, and a small model that they fit.

    Args:
        folder: for all files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        }
        self.model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        extended = clex.extend(self.model, ClexConfig(max_scale=4, steps=2))
        clex.save(extended, folder / "dynamics", weights="none", base_model="tiny-llama")
        self.fixed: FixedScale = fixed_scale(extended, scale=2.0)
        restore(self.model)
        self.about = json.loads((folder / "dynamics" / CONFIG_FILE).read_text())
        self.weights = (folder / "dynamics" / WEIGHTS_FILE).read_bytes()
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(self.model, lora)
        adapted.save_pretrained(folder / "adapter")
        self.model = adapted.unload()
        self.adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        self.gguf = self._write_gguf(folder / "valid.gguf").read_bytes()
        self.recipe = (Path(__file__).parent.parent / "recipes" / "quick.toml").read_text()

        self.record = {
            **{f.name: 1 if f.type in ("int", "float") else "x" for f in fields(ExportRecord)},
            "clex": {},
            "factors": [1.0],
            "versions": {},
            "sha256": {},
        }

    def _write_gguf(self, path: Path) -> Path:
        import gguf

        kinds = gguf.GGUFValueType
        fields = [
            Field("llama.block_count", 1, kinds.UINT32),
            Field("llama.embedding_length", 32, kinds.UINT32),
            Field("llama.attention.head_count", 2, kinds.UINT32),
            Field("llama.rope.freq_base", 10_000.0, kinds.FLOAT32),
            Field("general.license", "mit", kinds.STRING),
            Field("tokenizer.ggml.tokens", ["a", "b", "c"], kinds.ARRAY, kinds.STRING),
            Field("tokenizer.ggml.token_type", [1, 1, 1], kinds.ARRAY, kinds.INT32),
        ]
        norm = self.model.model.norm.weight.detach().float().numpy()
        query = np.ones((4, 32), dtype=np.float32)
        tensors = [
            GgufTensor("output_norm.weight", norm.shape, "F32", norm.dtype, lambda: norm),
            GgufTensor("blk.0.attn_q.weight", query.shape, "F32", query.dtype, lambda: query),
        ]
        write_gguf(path, "llama", fields, tensors)
        return path


Reader = Callable[[Inputs, random.Random], None]


def read_config(inputs: Inputs, rng: random.Random) -> None:
    """Any dictionary as a config, and the frequencies that it asks for."""
    methods = sorted(scaling_methods())
    values: dict[str, Any] = {
        "method": rng.choice(methods),
        "preset": rng.choice(("default", "paper")),
        "max_scale": rng.choice((2.0, 16, 4096.0)),
        "post": ["clip"],
        "layer_types": None,
        "options": {"factors": [1.0] * 8},
    }
    if rng.random() < 0.5:
        del values["options"]
    for _ in range(rng.randint(0, 2)):
        values = change_values(values, rng)
        if not isinstance(values, dict):
            return
    for name in rng.sample(("grid", "temperature", "width", "steps", "native_length"), 2):
        if rng.random() < 0.3:
            values[name] = rng.choice(NASTY)
    config = ClexConfig.from_dict(values)
    if config.steps is None or config.steps <= 64:
        try:
            model = clex.extend(inputs.model, config)
            for t in (1.0, 1.5, config.max_scale):
                found = clex.frequencies(model, t)
                if not found.isfinite().all() or (found < 0).any():
                    raise AssertionError(f"frequencies {found} of {config}")
        finally:
            restore(inputs.model)


def read_checkpoint(inputs: Inputs, rng: random.Random) -> None:
    """`clex_config.json`, `clex.safetensors`."""
    folder = inputs.folder / "dynamics"
    about, weights = json.dumps(inputs.about).encode(), inputs.weights
    if rng.random() < 0.8:
        changed = {**inputs.about, "clex": change_values(inputs.about["clex"], rng)}
        about = _json(changed if rng.random() < 0.5 else inputs.about, rng)
    else:
        weights = change_bytes(weights, rng)
        if rng.random() < 0.5:
            about = json.dumps({k: v for k, v in inputs.about.items() if k != "sha256"}).encode()
    (folder / CONFIG_FILE).write_bytes(about)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    try:
        load(folder, inputs.model)
    finally:
        restore(inputs.model)


def read_adapter(inputs: Inputs, rng: random.Random) -> None:
    """`adapter_config.json`, and the adapter that it describes."""
    folder = inputs.folder / "adapter"
    (folder / "adapter_config.json").write_bytes(_json(inputs.adapter, rng))
    model: Any = transformers.LlamaForCausalLM(inputs.model.config)
    load_adapter(model, folder)


def read_gguf(inputs: Inputs, rng: random.Random) -> None:
    """A GGUF file of the user, copied with the factors of a scale."""
    file = inputs.folder / "changed.gguf"
    file.write_bytes(change_bytes(inputs.gguf, rng))
    copy_gguf(file, inputs.folder / "copy.gguf", inputs.fixed, inputs.model, _SILENT)


def read_a_recipe(inputs: Inputs, rng: random.Random) -> None:
    """A recipe, its values or its bytes changed."""
    import tomllib

    if rng.random() < 0.5:
        file = inputs.folder / "recipe.toml"
        file.write_bytes(change_bytes(inputs.recipe.encode(), rng))
        read_recipe(file)
    else:
        content = change_values(tomllib.loads(inputs.recipe), rng)
        if isinstance(content, dict):
            parse_recipe(content, "", inputs.folder)


def read_results(inputs: Inputs, rng: random.Random) -> None:
    """The log of a measurement."""
    score = {
        **dict(method="clex", protocol="window", length=64, band_start=0, band_stop=0, document=0),
        **dict(scale=1.0, windows=1, nll=3.0, tokens=63, hits=1, bytes=99, last=True),
    }
    file = inputs.folder / "documents.jsonl"
    file.write_bytes(b"\n".join(_json(score, rng) for _ in range(rng.randint(1, 3))))
    rows_of(ScoreLog(file).scores)


def read_export(inputs: Inputs, rng: random.Random) -> None:
    """The record of an export."""
    (inputs.folder / "clex_export.json").write_bytes(_json(inputs.record, rng))
    read_record(inputs.folder)


def read_text(inputs: Inputs, rng: random.Random) -> None:
    """Text of any bytes."""
    name = rng.choice(("a.txt", "a.jsonl", "a.jsonl.gz"))
    file = inputs.folder / name
    data = b'{"text": "some words"}\n{"text": "caf\\u00e9"}\n' * 3
    file.write_bytes(change_bytes(data.decode().encode(rng.choice(_ENCODINGS)), rng))
    for text in read_documents([file]):
        assert len(text) <= MOST_CHARACTERS
        text.encode("utf-8")  # what a tokenizer does


_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1")
READERS: dict[str, Reader] = {
    "config": read_config,
    "checkpoint": read_checkpoint,
    "adapter": read_adapter,
    "gguf": read_gguf,
    "recipe": read_a_recipe,
    "results": read_results,
    "export": read_export,
    "text": read_text,
}


class _Hang(BaseException):
    pass


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _Hang(f"took more than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, inputs: Inputs, seconds: float, seed: int) -> Outcome:
    """Give a reader changed files for so many seconds."""
    outcome, end = Outcome(name), time.monotonic() + seconds
    while time.monotonic() < end:
        # Each execution has a seed of its own, by which it can be repeated.
        number = seed * 1_000_000_007 + outcome.executions
        rng = random.Random(number)
        size, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        broken = None
        try:
            with _alarm(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                READERS[name](inputs, rng)
            outcome.accepted += 1
        except ClexError as error:
            if "\n" in str(error):
                broken = f"more than a line: {error!r}"
        except (Exception, _Hang) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            broken = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size
        if grown > _MOST_GROWTH:
            broken = f"{broken or ''} took {grown // 1000:,} MB"
        outcome.slowest = max(outcome.slowest, time.monotonic() - began)
        if broken:
            outcome.crashes.append(f"seed {number}: {broken[:400]}")
        outcome.executions += 1
    return outcome


def main() -> None:
    """Fuzz all readers, and print what came of it; exit code 1 where one crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=70.0, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=list(READERS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    names = given.reader or list(READERS)
    outcomes = []
    with tempfile.TemporaryDirectory() as place:
        inputs = Inputs(Path(place))
        for name in names:
            outcomes.append(fuzz(name, inputs, given.seconds / len(names), given.seed))
            print(json.dumps(asdict(outcomes[-1])), flush=True)
    if given.out:
        write_json(given.out, [asdict(outcome) for outcome in outcomes])
    crashes = sum(len(outcome.crashes) for outcome in outcomes)
    print(f"executions: {sum(o.executions for o in outcomes):,}; crashes: {crashes}")
    sys.exit(crashes > 0)


if __name__ == "__main__":
    main()
