"""Make a ready-made result of fitted dynamics: the few numbers, their config, and a card.

    python scripts/pack_dynamics.py COMPARISON --method clex --text "what it was fitted on" \\
        --out src/clex/assets/smollm2-dynamics

COMPARISON is a folder of `clex compare recipes/frozen.toml`; its numbers make the card. The name of
the folder has to stand in `clex.hf.checkpoint.READY_MADE`, and that of its model in a form that any
user has: a hub id, or a name of `clex.hf.models.BUNDLED`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

from clex.errors import ConfigError
from clex.hf.checkpoint import CONFIG_FILE, WEIGHTS_FILE, base_name, load_config, read_about
from clex.hf.models import BUNDLED
from clex.run_folder import RUN_FILE

SHOWN = ("base", "yarn", "ntk")


def main() -> None:
    """Copy and describe the result that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--method", default="clex")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", required=True, help="what it was fitted and measured on")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    pack(args.comparison, args.method, args.seed, args.text, args.out)


def pack(comparison: Path, method: str, seed: int, text: str, out: Path) -> None:
    """Write the folder `out`.

    Raises:
        ConfigError: the result has weights of its own, or a base that users do not have.
    """
    source = comparison / "runs" / method / f"seed-{seed}" / "model"
    if read_about(source).get("weights") != "none":
        raise ConfigError(f"{source} has weights of its own; only dynamics are packed")
    model = base_name(source)
    if model not in BUNDLED and (model.count("/") != 1 or model.startswith((".", "/"))):
        raise ConfigError(f"{source} was made from {model!r}, which others do not have")
    results = json.loads((comparison / "results.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / WEIGHTS_FILE, out / WEIGHTS_FILE)
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    versions = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))["versions"]
    with (comparison / "results.csv").open(newline="", encoding="utf-8") as lines:
        own = {
            (int(row["length"]), row["protocol"]): float(row["ppl"])
            for row in csv.DictReader(lines)
            if (row["method"], row["seed"]) == (method, str(seed))
        }
    card = _card(out, results, method, model, f"{text}; fitted on {versions['device']}", own)
    (out / "README.md").write_text(card, encoding="utf-8")


def _card(
    folder: Path,
    results: dict[str, Any],
    method: str,
    model: str,
    text: str,
    own: dict[tuple[int, str], float],
) -> str:
    config = load_config(folder)
    about = next(m for m in results["methods"] if m["name"] == method)
    cells = {
        (c["method"], c["length"], c["protocol"]): c["ppl"]
        for c in results["perplexity"]
        if c["method"] in (*SHOWN, method)
    }
    assert config.native_length is not None
    fitted = config.fitted_scale or config.max_scale
    longest = round(config.native_length * config.max_scale)
    windows = about["training"]["steps"] * about["training"]["global_batch"]
    lengths = sorted({length for _, length, _ in cells if length <= longest})
    names = [name for name in (*SHOWN, method) if any(key[0] == name for key in cells)]
    labels = {m["name"]: m["label"] for m in results["methods"]}
    table = [
        "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "| --- |" + " ---: |" * len(lengths),
    ]
    for name in names:
        row = [
            f"{cells[name, n, 'window']:,.2f} / {cells[name, n, 'target']:,.2f}" for n in lengths
        ]
        table.append(f"| {labels[name]} | " + " | ".join(row) + " |")
    seeds = "One seed."
    if len(about["runs"]) > 1:
        row = [f"{own[n, 'window']:,.2f} / {own[n, 'target']:,.2f}" for n in lengths]
        table.append("| this folder | " + " | ".join(row) + " |")
        seeds = (
            f"This folder is one of {len(about['runs'])} seeds, whose mean is in the row before it."
        )
    return f"""---
license: apache-2.0
base_model: {model}
library_name: clex
---

# {folder.name}

Dynamics that let `{model}` read {longest:,} tokens instead of {config.native_length:,}. No weight
of the model is changed, and inside its own window its logits are bit-equal to its own.

    model = clex.load("{folder.name}")

- Method: `{config.method}` on `{config.base}`, temperature `{config.temperature}`, fitted up
  to t = {fitted:g}, where its learned part stays; each layer has of its own: {config.per_layer}
- Fitted on {about["tokens"]:,} tokens in {windows} windows of their true lengths, in
  {about["train_seconds"]:.0f} s
- Text: {text}

Perplexity of the first L tokens / of the same last {results["text"]["target"]:,} tokens with L
tokens of context; {results["text"]["documents"]} unseen documents:

{chr(10).join(table)}

{seeds}

`scripts/pack_dynamics.py` made this folder.
"""


if __name__ == "__main__":
    main()
