"""The model card of an export: what it is, how good it was measured to be, how to serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json
from ..serving.length_classes import FIRST_RUNNER, PROCESSOR
from .record import GGUF_FILE, ExportRecord

_TRAINING_KEYS = ("depth", "steps", "train_length", "rate", "dynamics_rate", "positions", "seed")


def write_card(
    folder: Path, record: ExportRecord, *, license_name: str | None, languages: list[str]
) -> None:
    """Write README.md into an export.

    Training settings come from run.json and the measured table from results.json beside the
    source, where they exist.

    Args:
        folder: of the export.
        record: what it is.
        license_name: of the base model, if that is known.
        languages: of the base model, as far as known.
    """
    parts = [
        _front(record, license_name, languages),
        _what(record, license_name),
        _training(Path(record.source)),
        _results(Path(record.source)),
        _serving(record),
        _limits(record),
    ]
    text = "\n".join(part for part in parts if part)
    (folder / "README.md").write_text(text, encoding="utf-8")


def license_of(folder: str | Path) -> tuple[str | None, list[str]]:
    """Licence and languages of a model, from the front of the README.md in its folder."""
    readme = Path(folder) / "README.md"
    if not readme.is_file():
        return None, []
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0] != "---":
        return None, []
    found: dict[str, str] = {}
    languages: list[str] = []
    key = ""
    for line in lines[1 : lines.index("---", 1) if "---" in lines[1:] else 1]:
        if line.startswith("- ") and key == "language":
            languages.append(line[2:].strip())
        elif ":" in line and not line.startswith((" ", "-")):
            key, _, value = line.partition(":")
            found[key] = value.strip().strip("\"'")
    if not languages and found.get("language"):
        languages = [found["language"]]
    return found.get("license") or None, languages


def _front(record: ExportRecord, license_name: str | None, languages: list[str]) -> str:
    lines = ["---"]
    if license_name:
        lines.append(f"license: {license_name}")
    if "/" in record.base_model and not Path(record.base_model).exists():
        lines.append(f"base_model: {record.base_model}")
    if languages:
        lines += ["language:", *(f"- {name}" for name in languages)]
    library = "gguf" if record.target == "gguf" else "transformers"
    return "\n".join([*lines, f"library_name: {library}", "tags:", "- long-context", "---", ""])


def _what(record: ExportRecord, license_name: str | None) -> str:
    base = record.clex.get("base")
    method = record.clex["method"] + (f" around {base}" if base else "")
    factors = record.factors
    rows = {
        "base model": _name(record.base_model),
        "licence of the base model": license_name or "not stated in its files; ask its authors",
        "method": method,
        "trained": _trained(record),
        "longest text": f"{record.length:,} tokens",
        "native window": f"{record.native_length:,} tokens",
        "scale t": ", ".join(f"{t:g}" for t in record.scales) or f"{record.scale:g}",
        "logit temperature": f"{record.temperature:.6g}",
        "factors on the wavelengths": f"{factors[0]:.4g} (fastest) to {factors[-1]:.4g} (slowest),"
        f" {len(factors)} of them, in clex_export.json",
        "form": record.form,
        "weights": record.weights,
        "query weights": record.queries,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"# {_name(record.base_model)}, {record.length:,} tokens\n\n"
        f"A longer window for {_name(record.base_model)}, {_held(record)}\n"
        f"\n| | |\n| --- | --- |\n{table}\n"
    )


def _held(record: ExportRecord) -> str:
    link = "[clex](https://pypi.org/project/clex-llm/)"
    if record.scales:
        return (
            f"at several scales, written by {link}. vLLM serves it with clex's plugin installed,"
            " and gives each request the scale of its own length."
        )
    return f"held at one scale by {link}. No code beside the engine's own is needed."


def _trained(record: ExportRecord) -> str:
    if record.trained_weights != "none":
        return {"adapter": "adapters, merged into the weights", "full": "all weights"}[
            record.trained_weights
        ]
    return "frequencies and temperature" if record.clex["method"] == "clex" else "nothing"


def _name(model: str) -> str:
    """A hub id as it is; of a path only its last part: where it lay is no one's business."""
    return Path(model).name if model.startswith(("/", ".", "~")) or Path(model).exists() else model


def _training(source: Path) -> str:
    if not (source / "run.json").is_file():
        return ""
    settings = read_json(source / "run.json").get("settings", {})
    training: dict[str, Any] = settings.get("training") or {}
    rows = [f"| data | {_name(str(settings.get('data')))} |"]
    rows += [f"| {k} | {training[k]} |" for k in _TRAINING_KEYS if training.get(k) is not None]
    return "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def _results(source: Path) -> str:
    """The measured table, lengths in columns: perplexity of the window / of the same targets."""
    if not (source / "results.json").is_file():
        return ""
    cells: dict[str, dict[int, dict[str, float]]] = {}
    for row in read_json(source / "results.json"):
        place = cells.setdefault(row["method"], {}).setdefault(int(row["length"]), {})
        place[row["protocol"]] = float(row["ppl"])
    lengths = sorted({length for rows in cells.values() for length in rows})
    lines = [
        "| | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "| --- |" + " --- |" * len(lengths),
    ]
    for method, rows in cells.items():
        values = (
            " / ".join(f"{rows[n][p]:.2f}" for p in ("window", "target") if p in rows.get(n, {}))
            for n in lengths
        )
        lines.append(f"| {method} | " + " | ".join(values) + " |")
    return (
        "## Measured\n\nPerplexity of the first L tokens / of the same target tokens with L tokens"
        " before them, with the scale following the length; this export holds one scale for all"
        " lengths.\n\n" + "\n".join(lines) + "\n"
    )


def _serving(record: ExportRecord) -> str:
    length = record.length
    if record.target == "gguf":
        commands = (
            f"llama-server -m {GGUF_FILE} -c {length}\n"
            f"printf 'FROM ./{GGUF_FILE}\\nPARAMETER num_ctx {length}\\n' > Modelfile\n"
            "ollama create longer -f Modelfile && ollama run longer"
        )
        return f"## Serving\n\n```\n{commands}\n```\n"
    vllm = f"vllm serve . --max-model-len {length}"
    if record.scales:
        return (
            "## Serving\n\nEach request is read at the smallest scale that holds its prompt and its"
            " `max_tokens`; so give `max_tokens`.\n\n```\n"
            f"pip install 'clex-llm[vllm]'\n{'='.join(FIRST_RUNNER)} {vllm}"
            f" --no-enable-prefix-caching \\\n    --logits-processors {PROCESSOR}\n```\n"
        )
    if record.form == "two_scales":
        native = record.native_length
        return (
            "## Serving\n\nThe scale is chosen once, at the start of vLLM; not for transformers.\n"
            f"\n```\n{vllm}    # long\nvllm serve . --max-model-len {native}    # short\n```\n"
        )
    python = (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n```\n'
    )
    return f"## Serving\n\n```\n{vllm}\n```\n\n{python}"


def _limits(record: ExportRecord) -> str:
    if record.scales:
        return (
            "## Elsewhere\n\nA vLLM without the plugin refuses this folder. Transformers reads it"
            f" at t = {record.scale:g} for every text.\n"
        )
    return (
        "## What one scale costs\n\n"
        "The live model takes t from the length of each text, and at t = 1 it is the base model."
        f" This export is at t = {record.scale:g} for every text: short prompts pay for the long"
        " window. Measure both lengths before you replace the base model.\n"
    )
