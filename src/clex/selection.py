"""Which step of a fit is its result: the one that reads long windows best, and it may be the start.

Fitted on one window of true length after another, dynamics can leave their closed form for the
worse, and the training loss, of another window each time, does not show it (docs/log.md, "The same
fit twice"). So a few windows are set apart, the same at every look, and the best look wins.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback

from . import processes
from .data import WindowPlan, Windows, collate
from .digests import digests_of, require_digests
from .files import output_errors, read_json, write_json
from .hf.checkpoint import load_extension_state, save_extension_state
from .hf.extend import at_scale, require_extension

SELECTION_FILE = "selection.json"
LOOKS = 6  # after the one at the start
# Far from the numbers of all windows that a run with the same seed trains on.
_SEED_APART = 2**21


def long_windows(
    tokens: datasets.Dataset, plan: WindowPlan, count: int, seed: int
) -> list[dict[str, Tensor]]:
    """Windows of true lengths, apart from those of training, their scales evenly spread.

    Args:
        tokens: training documents.
        plan: of training; the last window has its largest scale.
        count: number of windows.
        seed: of the run.
    """
    batches = []
    for index in range(count):
        scale = plan.min_scale + (plan.max_scale - plan.min_scale) * (index + 1) / count
        scale = float(math.floor(scale)) if plan.integer_scales else scale
        at = dataclasses.replace(plan, min_scale=scale, max_scale=scale, native_share=0.0, rising=0)
        batches.append(collate([Windows(tokens, at, count, seed + _SEED_APART)[index]]))
    return batches


class Selection(TrainerCallback):
    """Looks at the same windows at the start and at some steps, and keeps the best numbers.

    ``selection.json`` in the folder has the losses by step, in nats a token, and the step that was
    kept; the numbers lie beside the checkpoints until the run ends, so that it resumes.

    Args:
        trainer: the trainer of a run with windows of true lengths.
        windows: from `long_windows`.
        folder: of the run.
    """

    def __init__(self, trainer: Any, windows: list[dict[str, Tensor]], folder: Path) -> None:
        self.trainer, self.windows, self.folder = trainer, windows, folder
        steps = trainer.config.steps
        self.looks = {round(steps * (k + 1) / LOOKS) for k in range(LOOKS)} - {0}
        self.losses: dict[int, float] = {}
        self.best = 0
        self.sha256: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = self.folder / SELECTION_FILE
        before = processes.agreed(lambda: read_json(file) if file.is_file() else None)
        if state.global_step and before:
            self.losses = {int(step): loss for step, loss in before["losses"].items()}
            self.best, self.sha256 = before["kept"], before["sha256"]
        else:
            self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.looks:
            self._look(state.global_step)

    def keep_best(self, console: Console) -> None:
        """Put the numbers of the best look into the model, and say which it was.

        Raises:
            CheckpointError: they are damaged.
        """
        model, file = self.trainer.extended, self._numbers(self.best)
        if processes.is_main():
            require_digests(file.parent, self.sha256)
            load_extension_state(model, file)
        if processes.world_size() > 1:
            processes.same_everywhere(list(require_extension(model).scalings.parameters()))
        told = ", ".join(f"{loss:.4f} at step {step}" for step, loss in sorted(self.losses.items()))
        console.print(f"loss on {len(self.windows)} long windows set apart: {told}")
        if self.best == 0:
            console.print(
                "[yellow]no step reads them better than the start, which is kept[/yellow]; try"
                " other steps or rates, or another base curve"
            )
        else:
            console.print(f"keeping step {self.best}")

    def _look(self, step: int) -> None:
        # An engine that cuts weights up needs all processes for a forward pass.
        together = processes.cut_up(self.trainer.extended)
        own = self._loss() if together else None
        loss = self.losses[step] = processes.agreed(self._loss if own is None else lambda: own)
        self.trainer.require_finite(torch.tensor(math.isfinite(loss)), step, "loss on long windows")
        if not processes.is_main():
            return
        before = self.best
        if not self.sha256 or loss < self.losses[before]:
            self.best, file = step, self._numbers(step)
            save_extension_state(self.trainer.extended, file)
            self.sha256 = digests_of(file.parent, [file.name])
        record = {
            "scales": [round(batch["scale"].item(), 4) for batch in self.windows],
            "losses": {str(step): self.losses[step] for step in sorted(self.losses)},
            "kept": self.best,
            "sha256": self.sha256,
        }
        with output_errors(self.folder):
            write_json(self.folder / SELECTION_FILE, record)
            if before != self.best:
                self._numbers(before).unlink(missing_ok=True)

    def _numbers(self, step: int) -> Path:
        return Path(self.trainer.folder) / f"selected-{step}.safetensors"

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean over the windows of the loss that training has, in nats a token."""
        trainer = self.trainer
        model = trainer.extended
        total, training = 0.0, model.training
        model.eval()
        for batch in self.windows:
            ids = batch["input_ids"].to(trainer.args.device)
            scale = batch["scale"].to(trainer.args.device)
            weights = trainer.weights(ids.shape[1])
            with at_scale(model, scale), trainer.accelerator.autocast():
                losses, _ = trainer.token_loss(model, ids, last=len(weights))
            total += (losses[0].double() * weights).sum().item()
        model.train(training)
        return total / len(self.windows)
