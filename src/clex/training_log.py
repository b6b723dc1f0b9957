"""What is written down while a model trains: how its frequencies move, and a picture of it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from .errors import ConfigError, unknown
from .files import new_file
from .hf.extend import require_extension

LOG_FILE = "log.jsonl"
PICTURE_FILE = "training.png"
TENSORBOARD_FOLDER = "tensorboard"
# Steps from one record of the frequencies to the next: solving for them takes milliseconds.
EVERY = 10


def integrations(wanted: tuple[str, ...] | None) -> list[str]:
    """The Trainer integrations that are logged to; TensorBoard, where it is installed, by default.

    Args:
        wanted: names, ``("none",)`` for none at all, or `None` for the default.

    Raises:
        ConfigError: one does not exist, or is not installed.
    """
    installed = get_available_reporting_integrations()
    if wanted is None:
        return [name for name in ("tensorboard",) if name in installed]
    names = [name for name in wanted if name != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(unknown("logging integration", name, INTEGRATION_TO_CALLBACK))
        if name not in installed:
            raise ConfigError(f"logging to {name!r} needs its package: pip install {name}")
    return names


@torch.no_grad()
def frequency_ratios(model: nn.Module) -> dict[str, float]:
    """f(t) / f(1) of an extended model at a few scales and dimensions, as flat scalars.

    Returns:
        Keys ``frequency/t8/dim15``: scale 2, 4, 8 ... up to the largest, and pairs of dimensions
        from the fastest to the slowest. Of the first layer type where there are several.
    """
    scaling: Any = next(iter(require_extension(model).scalings.values()))
    most = scaling.config.max_scale
    scales = [2.0**k for k in range(1, 32) if 2**k < most] + [most]
    t = torch.tensor(scales, device=scaling.inv_freq_native.device)
    ratios = (scaling.inv_freq(t) / scaling.inv_freq_native).float().cpu()
    last = ratios.shape[1] - 1
    chosen = sorted({round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)})
    return {
        f"frequency/t{scale:g}/dim{dim}": ratios[row, dim].item()
        for row, scale in enumerate(scales)
        for dim in chosen
    }


def draw_training(folder: Path) -> None:
    """Draw loss and frequencies of ``log.jsonl`` in `folder` over the steps, if there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not (folder / LOG_FILE).is_file():
        return
    # After an interruption some steps were made twice; the later record is the one that counts.
    records: dict[int, dict[str, Any]] = {}
    for line in (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, TypeError, KeyError):
            continue  # a full disk or a kill left half of it
    steps = sorted(records)
    if not steps:
        return
    keys = [key for key in records[steps[-1]] if key.startswith("frequency/")]
    figure = Figure(figsize=(11 if keys else 5.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if keys else 1, squeeze=False)[0]
    panels[0].plot(steps, [records[step]["loss"] for step in steps], linewidth=1)
    panels[0].set(xlabel="step", ylabel="loss, nats a token")
    if keys:
        most = keys[-1].split("/")[1]
        for key in (k for k in keys if k.split("/")[1] == most):
            at = [step for step in steps if key in records[step]]
            panels[1].plot(at, [records[step][key] for step in at], label=key.split("/")[2])
        panels[1].set(xlabel="step", ylabel=f"f(t) / f(1) at {most}", yscale="log")
        panels[1].legend(fontsize=8)
    with new_file(folder / PICTURE_FILE) as temporary:
        figure.savefig(temporary, dpi=120)
