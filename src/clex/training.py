"""Training an extended model, on the Trainer of transformers.

One flag decides how much of the model moves: ``dynamics`` fits the few numbers of the extension
on windows of the true target lengths, ``lora`` adds low-rank adapters, ``full`` trains all weights;
the last two at one train length, with sampled positions that show the distances of longer texts.

Engines of accelerate (DDP, FSDP2, ZeRO-3, context parallelism) cut the work across processes. What
is trained on does not depend on the cut: scale and positions belong to a whole window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import get_last_checkpoint

from . import processes
from .config import ClexConfig
from .data import WindowPlan, Windows, collate
from .digests import digests_of, require_digests
from .errors import CheckpointError, ConfigError, TrainingError, unknown
from .files import output_errors, read_json, write_json
from .hf.checkpoint import (
    WEIGHTS_FILE,
    Weights,
    load_extension_state,
    save,
    save_extension_state,
)
from .hf.extend import at_scale, config_of, require_extension
from .hf.loss import UNSCORED, TokenLoss
from .hf.rotary import ropes_of
from .positions import parse_mixture, sample_positions
from .scaling import get_scaling
from .selection import Selection, long_windows
from .training_log import (
    EVERY,
    LOG_FILE,
    TENSORBOARD_FOLDER,
    draw_training,
    frequency_ratios,
    integrations,
)

DEPTHS: dict[str, Weights] = {"dynamics": "none", "lora": "adapter", "full": "full"}
CHECKPOINTS_FOLDER = "checkpoints"
_COMPLETE = "complete.json"
# A comparison lists the windows of each method, so that they cannot be without number.
_MOST_WINDOWS = 2**27

# What is tried first at each depth; see docs/log.md for the runs that chose these.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "dynamics": {
        "steps": 40,
        "accumulation": 4,
        "dynamics_rate": 3e-3,
        "native_share": 0.0,
        "warmup": 0.0,
        "batch_size": 1,
        "end_weight": 0.5,
        "select_windows": 6,
    },
}
_DEFAULTS["lora"] = _DEFAULTS["full"] = {
    "steps": 200,
    "rate": 2e-4,
    "native_share": 0.25,
    "scale_power": 2.0,
    "span_margin": 0.25,
}
# Where weights train on windows of true lengths, a few of them are the end of a training on sampled
# positions: what a run of 100 steps was measured with.
_TRUE_LENGTHS: dict[str, Any] = {
    "steps": 2,
    "accumulation": 2,
    "rate": 3e-5,
    "dynamics_rate": 3e-3,
    "end_weight": 0.3,
}
# Rate of the dynamics on sampled positions, by preset. Ours came out level with their start there
# at best, and behind it at 16 times the window (docs/log.md). The released ones learn with the
# weights.
_SAMPLED_DYNAMICS_RATE = {"default": 0.0, "paper": 1e-4}
_FROM_DEPTH: Any = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an extended model is trained. Values that are not given depend on `depth`.

    Args:
        depth: ``"dynamics"`` (weights frozen), ``"lora"`` or ``"full"``.
        train_length: tokens of a window, with sampled positions; the native length if not given.
        true_lengths: windows have the true length of their scale, up to `max_scale` times the
            native one, and no sampled positions; so it is at depth ``dynamics`` without a
            `train_length`. With weights that train it needs the memory of the longest window, and
            rates and steps are by default those of the end of a training on sampled positions.
        steps: optimiser steps.
        rate: learning rate of weights or adapters.
        dynamics_rate: learning rate of the extension; 3e-3 with windows of true lengths. On sampled
            positions 0, which holds it, or 1e-4 for an extension of the preset ``paper``; such a
            choice is ``None`` here, since the preset is not known yet.
        min_scale, max_scale: range of the scales in training; from 1 to the extension's own
            `max_scale` if not given. A smaller range tests what the dynamics extrapolate.
        scale_power: above 1 larger scales are drawn more often, with a density that grows as
            (t - min_scale)^(scale_power - 1); 1 is uniform. 2 where weights train, else 1.
        batch_size: windows in a forward pass of one process.
        accumulation: forward passes of each process in a step.
        global_batch: windows in a step of all processes together. If it is given `accumulation`
            follows from it, and a run may go on with another number of processes.
        warmup: share of the steps in which the rates rise; 0 at depth ``dynamics``.
        weight_decay: on weights; never on the extension.
        clip: largest gradient norm, of the weights and of the extension each on its own.
        native_share: share of windows at t = 1 with plain positions.
        curriculum: share of the windows, from the first, over which the largest scale grows
            geometrically from 2 (or `min_scale`) to `max_scale`; 0 is off.
        margin: how much longer windows of true lengths are than their scale says, for t above 1,
            so that the end of the range is safe.
        span_margin: how much farther sampled positions reach than their scale says, for t above 1;
            the last positions of a range are drawn least often. 0.25 where weights train.
        end_weight: share of the weight that the last half native window of a true length has on
            top, where most can go wrong; 0.5 at depth ``dynamics``, else 0.3. Where weights are
            frozen tokens beyond the native window alone are scored, whose distances are new.
        select_windows: long windows that choose between the start and six moments of a run of
            frozen weights with windows of true lengths (`clex.selection`); 0 keeps the last step,
            as do runs that cut texts across processes.
        shares: share of the windows from each source of a mixture (`clex.data.load_mixture`).
        long_factor: how much more often than by their size documents that fill a window are drawn.
        lora_rank: rank of the adapters.
        seed: of everything that is drawn.
        save_every: steps between checkpoints.
        precision: ``"auto"`` (bfloat16 on GPUs that have it), ``"bf16"`` or ``"fp32"``.
        checkpointing: recompute activations in the backward pass: ``"auto"`` (for windows above
            16,384 tokens), ``"on"`` or ``"off"``.
        compile: compile the decoder layers with torch.compile, but for windows of true lengths,
            each of which would be compiled anew.
        report_to: logging integrations of the Trainer; TensorBoard, where it is installed, if not
            given, and ``("none",)`` for none.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    depth: str = "dynamics"
    train_length: int | None = None
    true_lengths: bool = _FROM_DEPTH
    steps: int = _FROM_DEPTH
    rate: float = _FROM_DEPTH
    dynamics_rate: float | None = None
    min_scale: float = 1.0
    max_scale: float | None = None
    scale_power: float = _FROM_DEPTH
    batch_size: int = _FROM_DEPTH
    accumulation: int = _FROM_DEPTH
    global_batch: int | None = None
    warmup: float = _FROM_DEPTH
    weight_decay: float = 0.01
    clip: float = 1.0
    native_share: float = _FROM_DEPTH
    curriculum: float = 0.0
    margin: float = 0.03125
    span_margin: float = _FROM_DEPTH
    end_weight: float = _FROM_DEPTH
    select_windows: int = _FROM_DEPTH
    shares: tuple[float, ...] = ()
    long_factor: float = 1.0
    lora_rank: int = 16
    seed: int = 0
    save_every: int = 50
    precision: str = "auto"
    checkpointing: str = "auto"
    compile: bool = False
    report_to: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise ConfigError(unknown("training depth", self.depth, DEPTHS))
        if self.global_batch is not None and self.accumulation is None:
            object.__setattr__(self, "accumulation", 1)  # follows below
        fallback = {
            "rate": 0.0,
            "warmup": 0.05,
            "batch_size": 1,
            "accumulation": 1,
            "end_weight": 0.0,
            "select_windows": 0,
            "scale_power": 1.0,
            "span_margin": 0.0,
            "true_lengths": self.depth == "dynamics" and self.train_length is None,
        }
        fallback |= _DEFAULTS[self.depth]
        if self.true_lengths and self.depth != "dynamics":
            fallback |= _TRUE_LENGTHS
        for name, value in fallback.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, valid in (
            ("precision", ("auto", "bf16", "fp32")),
            ("checkpointing", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in valid:
                raise ConfigError(unknown(name, getattr(self, name), valid))
        limits = {
            "steps": (1, 10_000_000),
            "batch_size": (1, 65536),
            "accumulation": (1, 65536),
            "rate": (0.0, 10.0),
            "dynamics_rate": (0.0, 10.0),
            "warmup": (0.0, 1.0),
            "native_share": (0.0, 1.0),
            "curriculum": (0.0, 1.0),
            "margin": (0.0, 1.0),
            "span_margin": (0.0, 1.0),
            "scale_power": (0.1, 10.0),
            "end_weight": (0.0, 1.0),
            "select_windows": (0, 1024),
            "long_factor": (0.01, 1e6),
            "lora_rank": (1, 4096),
            "save_every": (1, 10_000_000),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if name == "dynamics_rate" and value is None:
                continue  # the preset decides
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, not {value!r}")
            if not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"{name} = {value} is out of range (valid: {low:g} to {high:g})")
        if self.global_batch is not None:
            at_once = self.batch_size * processes.readers()
            if self.accumulation not in (1, self.global_batch // at_once):
                raise ConfigError("give either accumulation or a global batch, not both")
            if self.global_batch < 1 or self.global_batch % at_once:
                raise ConfigError(
                    f"global batch {self.global_batch} is no multiple of {at_once} windows"
                    f" (batch_size {self.batch_size} in {processes.readers()} processes)"
                )
            object.__setattr__(self, "accumulation", self.global_batch // at_once)
        windows = self.steps * self.windows_per_step
        if windows > _MOST_WINDOWS:
            raise ConfigError(
                f"{self.steps:,} steps of {self.windows_per_step:,} windows are out of range"
                f" (valid: up to {_MOST_WINDOWS:,} windows in all)"
            )
        if self.train_length is not None and not 8 <= self.train_length <= 2**27:
            raise ConfigError(f"train_length = {self.train_length} is out of range (at least 8)")
        if not isinstance(self.true_lengths, bool):
            raise ConfigError(f"true_lengths must be true or false, not {self.true_lengths!r}")
        if self.true_lengths and self.train_length is not None:
            raise ConfigError(
                f"give either a train length ({self.train_length}) or true lengths, not both"
            )
        if self.select_windows and self.depth != "dynamics":
            raise ConfigError(
                f"select_windows chooses between numbers of the dynamics, not at depth {self.depth}"
            )

    @property
    def windows_per_step(self) -> int:
        """Windows in a step of all processes together."""
        return self.batch_size * self.accumulation * processes.readers()

    def to_dict(self) -> dict[str, Any]:
        """What a result depends on, as plain JSON types; not how a step is cut or logged."""
        values = dataclasses.asdict(self)
        del values["batch_size"], values["accumulation"], values["report_to"]
        return {**values, "global_batch": self.windows_per_step}


def train(
    model: nn.Module,
    tokens: datasets.Dataset,
    config: TrainConfig,
    folder: str | Path,
    *,
    base_model: str | None = None,
    tokenizer: Any = None,
    weights: Weights | None = None,
    console: Console | None = None,
) -> nn.Module:
    """Train an extended model and save it to `folder`.

    An interrupted run goes on from its last checkpoint when it is started again on the same folder.
    In a run of several processes all of them call this; the main one writes.

    Args:
        model: from `clex.extend`.
        tokens: documents, from `clex.data.load_tokens`.
        config: how to train.
        folder: for checkpoints, the log (`log.jsonl`) and the result, which `clex.load` reads.
        base_model: name of the plain model, kept in the result.
        tokenizer: saved with the result where weights are saved.
        weights: what is saved beside the extension; what `config.depth` trains if not given.
        console: where progress is shown.

    Returns:
        The trained model; a PEFT model at depth ``lora``. Under an engine that cuts weights up it
        can only be called by all processes together; read the folder instead.

    Raises:
        ConfigError: the train length does not fit the model or the sampler.
        DataError: documents are too short.
        TrainingError: the loss became NaN or infinite, or another process ended; the last good
            checkpoint is kept.
        CheckpointError: the checkpoint to go on from is damaged.
        OutputError: the disk is full, or `folder` cannot be written.
    """
    folder, weights = Path(folder), weights or DEPTHS[config.depth]
    trainer = make_trainer(model, tokens, config, folder)
    model = trainer.extended
    console = console or Console(stderr=True, quiet=not processes.is_main())
    shown = _Progress(trainer, folder / LOG_FILE, console)
    trainer.add_callback(shown)
    checkpoint = processes.agreed(lambda: _last_undamaged(folder / CHECKPOINTS_FOLDER))
    trainer.require_same_run(checkpoint)
    try:
        with (
            processes.others_alive(lambda: _way_on(folder / CHECKPOINTS_FOLDER)),
            _compiled_layers(trainer),
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
            state = trainer.whole_weights()
            if trainer.selection:
                trainer.selection.keep_best(console)
    except pickle.UnpicklingError as error:  # all is read without running what it holds
        raise CheckpointError(
            f"cannot go on from {checkpoint}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        shown.progress.stop()  # gives the cursor back, after an error too
    if processes.is_main():
        save(
            model,
            folder,
            weights=weights,
            base_model=base_model,
            tokenizer=tokenizer if weights != "none" else None,
            state=state,
        )
        draw_training(folder)
    return model.eval()


@contextlib.contextmanager
def _compiled_layers(trainer: ExtensionTrainer) -> Iterator[None]:
    """Decoder layers run compiled inside the block, where the run asks for it.

    All layers share one graph, and so do the models of several runs in one process.
    """
    layers: list[Any] = []
    if trainer.config.compile and not trainer.true_lengths:
        # A pass over a few tokens; compiled, it would make the compiler expect any length.
        trainer.token_loss.check(trainer.windows[0]["input_ids"][None].to(trainer.args.device))
        modules = trainer.extended.modules()
        layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in layers:  # there is no public way back
            layer._compiled_call_impl = None


def make_trainer(
    model: nn.Module, tokens: datasets.Dataset, config: TrainConfig, folder: Path
) -> ExtensionTrainer:
    """The trainer that `train` runs, before its first step; arguments and errors are those."""
    processes.join()
    extension = config_of(model)
    plan = check_plan(extension, config, tokens)
    windows = Windows(tokens, plan, _items(config), config.seed)
    set_seed(config.seed)  # adapters are drawn before the Trainer sets it
    model = _prepare(model, config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"method {extension.method!r} has nothing to train at depth 'dynamics'")
    with output_errors(folder):
        (folder / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    arguments = _arguments(config, folder / CHECKPOINTS_FOLDER, plan.window(plan.max_scale))
    trainer = ExtensionTrainer(
        model=model, args=arguments, train_dataset=windows, data_collator=collate, config=config
    )
    if config.select_windows and trainer.true_lengths and trainer.pieces == 1:
        apart = long_windows(tokens, plan, config.select_windows, config.seed)
        trainer.selection = Selection(trainer, apart, folder)
        trainer.add_callback(trainer.selection)
    if "tensorboard" in integrations(config.report_to) and processes.is_main():
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(log_dir=str(folder / TENSORBOARD_FOLDER))
        trainer.add_callback(TensorBoardCallback(writer))
    return trainer


def check_plan(extension: ClexConfig, config: TrainConfig, tokens: datasets.Dataset) -> WindowPlan:
    """What training windows will look like, after all checks that need no training.

    Args:
        extension: the config of an extended model, `native_length` filled in.
        config: how it is to be trained.
        tokens: training documents.

    Raises:
        ConfigError: the train length or the scales do not fit the extension, or the sampler is
            unknown.
        DataError: the documents are too short.
    """
    native = extension.native_length
    assert native is not None
    length = None if config.true_lengths else config.train_length or native
    if length is not None and length > native * extension.max_scale:
        raise ConfigError(
            f"train length {length} is above max_scale * native_length ="
            f" {extension.max_scale:g} * {native} = {round(extension.max_scale * native)}"
        )
    if length is None and config.batch_size > 1:
        raise ConfigError(
            "batch_size must be 1 for windows of their true lengths, which differ;"
            " raise accumulation instead, or give a train length"
        )
    parse_mixture(extension.positions)
    # The engine gives each process a piece from the front and one from the back of a text.
    cut = 2 * processes.pieces() if processes.pieces() > 1 else 1
    if cut > 1 and not get_scaling(extension.method).rotates:
        raise ConfigError(f"method {extension.method!r} cannot cut a text across processes")
    if length is not None and length % cut:
        raise ConfigError(
            f"train length {length} is no multiple of {cut}, into which"
            f" {processes.pieces()} processes cut each window"
        )
    most = config.max_scale or extension.max_scale
    if not 1 <= config.min_scale <= most <= extension.max_scale:
        raise ConfigError(
            f"training scales {config.min_scale:g} to {most:g} must lie between 1 and the"
            f" extension's max_scale {extension.max_scale:g}"
        )
    fitted = extension.fitted_scale
    if config.depth == "dynamics" and fitted is not None and most > fitted:
        raise ConfigError(
            f"training scales up to {most:g} are above fitted_scale {fitted:g}, beyond which the"
            f" learned part stays: train up to {fitted:g}, or start afresh"
        )
    plan = WindowPlan(
        tokens=length,
        native_length=native,
        min_scale=config.min_scale,
        max_scale=most,
        power=config.scale_power,
        margin=config.margin,
        native_share=config.native_share,
        integer_scales=extension.integer_scales,
        rising=round(config.curriculum * _items(config)),
        multiple=cut,
        packed=cut == 1,
        shares=config.shares,
        long_factor=config.long_factor,
    )
    Windows(tokens, plan, count=1)
    return plan


def _items(config: TrainConfig) -> int:
    """Windows of a whole run, of all processes together."""
    return config.steps * config.windows_per_step


def _prepare(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Freeze what must not move; at depth ``lora`` train the model's adapter, or a new one."""
    model.requires_grad_(config.depth == "full")
    if config.depth == "lora" and isinstance(model, peft.PeftModel):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif config.depth == "lora":
        lora = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            # The extension's own small layers are trained as they are.
            exclude_modules=r".*\.scalings\..*",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, lora)
    require_extension(model).scalings.requires_grad_(True)
    return model


def _arguments(config: TrainConfig, folder: Path, longest: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    checkpointing = config.checkpointing == "on" or (
        config.checkpointing == "auto" and longest > 16384
    )
    # What a launcher's config says would go before `bf16` below.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        adam_beta2=0.95,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        bf16=bf16,
        use_cpu=not cuda,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        disable_tqdm=True,
        # TensorBoard gets a folder of its own.
        report_to=[n for n in integrations(config.report_to) if n != "tensorboard"] or "none",
        accelerator_config={"use_seedable_sampler": True},
        **(_recompute() if checkpointing else {}),
    )


def _recompute() -> dict[str, Any]:
    """Activation checkpointing, under the name that this release of transformers has for it."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    prefix = "activation" if "activation_checkpointing" in fields else "gradient"
    return {
        f"{prefix}_checkpointing": True,
        # The reentrant form walks the shared cos/sin graph once per layer and finds it freed.
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": False},
    }


class ExtensionTrainer(Trainer):
    """The Trainer with sampled positions, bounded-memory loss and two kinds of parameters."""

    def __init__(self, *, config: TrainConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.extended: Any = kwargs["model"]
        self.extension = config_of(self.extended)
        self.token_loss = TokenLoss(
            self.extended.get_base_model()
            if isinstance(self.extended, peft.PeftModel)
            else self.extended
        )
        self.tokens_seen = 0
        self.folder = Path(str(self.args.output_dir))
        self.windows: Any = kwargs["train_dataset"]
        self.true_lengths = self.windows.plan.tokens is None
        # Our loss is a mean over the batch; the Trainer is to divide it by the accumulation.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._pending: Tensor | None = None
        self._pending_step = 0
        self.pieces = processes.pieces()
        self.selection: Selection | None = None
        if self.is_fsdp_enabled:
            self._keep_dynamics_whole()
        # No "default" handlers that print: progress is shown by our own callback.
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                self.remove_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # Items are random already, each by its own number.
        return SequentialSampler(self.windows)

    def _keep_dynamics_whole(self) -> None:
        """Tell FSDP2 to leave the extension alone, in float32, and to add gradients in float32."""
        plugin: Any = self.accelerator.state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ConfigError("clex trains under FSDP version 2 only: fsdp_version: 2")
        plugin.ignored_modules = [rope.scalings for rope in ropes_of(self.extended)]
        # It would move the extension to the meta device; each process has loaded the model.
        plugin.cpu_ram_efficient_loading = False
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.args.bf16 else None,
            reduce_dtype=torch.float32,
            # Layers are given positions in float32, which bfloat16 would round by hundreds.
            cast_forward_inputs=False,
        )
        processes.same_everywhere(learned_parameters(self.extended))

    def _positions(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Positions (B, n) of the tokens of whole windows; `None`: 0, 1, ..., n - 1."""
        ids, native = inputs["input_ids"], self.extension.native_length
        assert native is not None
        if self.true_lengths:
            return None
        t, most = inputs["scale"], self.windows.plan.max_scale
        if self.config.span_margin:
            t = torch.where(t > 1, t * (1 + self.config.span_margin), t)
            most *= 1 + self.config.span_margin
        return sample_positions(
            self.extension.positions, ids.shape[1], t, inputs["seed"], native, most
        )

    def weights(self, n: int) -> Tensor:
        """Weights of the scored tokens of a window of `n`, float32 (last,), sum 1."""
        native = self.extension.native_length
        assert native is not None
        last, end = n - 1, 0
        if self.true_lengths:
            end = min(n - 1, max(1, native // 2))
            if self.config.depth == "dynamics":
                last = max(n - native, end)
        share = self.config.end_weight if end else 0.0
        weights = torch.full((last,), (1 - share) / last, device=self.args.device)
        weights[last - end :] += share / max(end, 1)
        return weights

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The context in which each process has its piece of tokens, targets and positions.

        Positions are made for the whole window and cut with it. The host's own `position_ids`
        count the tokens of the piece, and so index the piece of the table.
        """
        if self.pieces == 1:
            return contextlib.nullcontext, inputs
        ids = inputs["input_ids"]
        self.token_loss.check(ids)
        positions = self._positions(inputs)
        if positions is None:
            positions = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
            positions = positions.repeat(len(ids), 1)
        targets = nn.functional.pad(ids[:, 1:], (0, 1), value=UNSCORED)
        weights = self.weights(ids.shape[1])
        # The last token predicts nothing.
        weights = nn.functional.pad(weights, (ids.shape[1] - 1 - len(weights), 1)).repeat(
            len(ids), 1
        )
        targets[weights == 0] = UNSCORED
        inputs = {**inputs, "positions": positions, "targets": targets, "weights": weights}
        buffers = [ids, positions, targets, weights]
        context = functools.partial(
            self.accelerator.maybe_context_parallel,
            buffers=buffers,
            buffer_seq_dims=[1, 1, 1, 1],
            no_restore_buffers=set(buffers),
        )
        return context, inputs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A forward and a backward pass; after the last one of a step gradients are whole."""
        loss = super().training_step(*args, **kwargs)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            processes.average_gradients(learned_parameters(self.extended))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean over windows of their mean loss, which no cut of a batch changes."""
        inputs = dict(inputs)
        ids = inputs["input_ids"]
        self.tokens_seen += ids.numel()
        targets = inputs.pop("targets", None)
        positions = inputs.pop("positions") if targets is not None else self._positions(inputs)
        scale = inputs.pop("scale")
        del inputs["seed"]
        weights = inputs.pop("weights") if targets is not None else self.weights(ids.shape[1])
        with at_scale(self.extended, scale, positions), self.accelerator.autocast():
            what: dict[str, Any] = (
                {"last": len(weights)} if targets is None else {"targets": targets}
            )
            losses, _ = self.token_loss(model, **inputs, **what)
        self._watch(losses)
        if "position_ids" in inputs:
            # The first token of a document has nothing before it; the others are as good as any.
            weights = weights * (inputs["position_ids"][:, -len(weights) :] != 0)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
        # Pieces' losses add up, but the engine takes the mean of the pieces' gradients.
        loss = (losses * weights).sum(dim=-1).mean() * self.pieces
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and every few steps the frequencies with it."""
        step = self.state.global_step
        due = step % EVERY == 0 or step in (1, self.state.max_steps)
        if "loss" in logs and due and learned_parameters(self.extended):
            logs = {**logs, **frequency_ratios(self.extended)}
        super().log(logs, *args, **kwargs)

    def _watch(self, losses: Tensor) -> None:
        """Stop at a loss that is no number; looks one step back, so as not to wait."""
        before, self._pending = self._pending, losses.detach().isfinite().all()
        step, self._pending_step = self._pending_step, self.state.global_step + 1
        self.require_finite(before, step)

    def require_finite(self, flag: Tensor | None, step: int, what: str = "loss") -> None:
        """End the run where `flag` is false, and name the last good checkpoint."""
        if flag is not None and not flag.item():
            good = _last_complete(self.folder)
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise TrainingError(f"the {what} is not a number at step {step}; {where}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the extension's own rate and without decay on it."""
        if self.optimizer is None:
            ours = {id(p) for p in learned_parameters(self.extended)}
            rest = [p for p in self.extended.parameters() if p.requires_grad and id(p) not in ours]
            groups: list[dict[str, Any]] = [
                {
                    "params": [p for p in rest if p.dim() > 1],
                    "lr": self.args.learning_rate,
                    "weight_decay": self.args.weight_decay,
                },
                {
                    "params": [p for p in rest if p.dim() <= 1],
                    "lr": self.args.learning_rate,
                    "weight_decay": 0.0,
                },
                {
                    "params": [p for p in learned_parameters(self.extended) if p.requires_grad],
                    "lr": self._dynamics_rate(),
                    "weight_decay": 0.0,
                },
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.extended)
            options.pop("lr", None)
            self.optimizer = cls([g for g in groups if g["params"]], **options)
        return self.optimizer

    def _dynamics_rate(self) -> float:
        if self.config.dynamics_rate is not None:
            return self.config.dynamics_rate
        return _SAMPLED_DYNAMICS_RATE[self.extension.preset]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip weights and extension each on its own: a jumpy field must not slow the weights."""
        ours = {id(p) for p in learned_parameters(self.extended)}
        rest = [p for p in model.parameters() if id(p) not in ours and p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(
            learned_parameters(self.extended), self.args.max_grad_norm
        )
        return self.accelerator.clip_grad_norm_(rest, self.args.max_grad_norm) if rest else norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite(self._pending, self.state.global_step)
        learned = [p.detach() for p in self.extended.parameters() if p.requires_grad]
        own = [p.to_local() if isinstance(p, DTensor) else p for p in learned]
        finite = torch.stack([part.isfinite().all() for part in own]).all()
        self.require_finite(finite, self.state.global_step, "gradient")
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        with output_errors(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.args.should_save:
            # Sharding engines write weights in a form of their own, and only those.
            save_extension_state(self.extended, folder / WEIGHTS_FILE)
            files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
            record = {"step": self.state.global_step, **self._about_run()}
            write_json(folder / _COMPLETE, {**record, "sha256": digests_of(folder, files)})

    def _about_run(self) -> dict[str, Any]:
        """What a checkpoint has to share with the run that goes on from it."""
        sharded = [name for name in ("fsdp", "deepspeed") if getattr(self, f"is_{name}_enabled")]
        return {
            "engine": sharded[0] if sharded else "plain",
            "windows_per_step": self.config.windows_per_step,
        }

    def require_same_run(self, checkpoint: str | None) -> None:
        """Check that this run can go on from `checkpoint`, with any number of processes.

        Raises:
            ConfigError: its steps had other windows, or its files are those of another engine.
        """
        if checkpoint is None:
            return
        before = processes.agreed(lambda: read_json(Path(checkpoint) / _COMPLETE))
        now = self._about_run()
        if before.get("engine", "plain") != now["engine"]:
            raise ConfigError(
                f"{checkpoint} was written under engine {before['engine']!r}; start this run"
                f" under it, not under {now['engine']!r}"
            )
        if before.get("windows_per_step", now["windows_per_step"]) != now["windows_per_step"]:
            raise ConfigError(
                f"{checkpoint} has steps of {before['windows_per_step']} windows, this run of"
                f" {now['windows_per_step']}; pass --global-batch {before['windows_per_step']}"
            )

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights, where an engine has cut them up; to be called by all processes."""
        if self.config.depth == "dynamics" or not (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        ):
            return None
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return state

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save(
                self.extended,
                output_dir or self.folder,
                weights=DEPTHS[self.config.depth],
                state=state_dict,
            )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.config.depth != "dynamics" or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_extension_state(self.extended, Path(resume_from_checkpoint) / WEIGHTS_FILE)


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of an extension, each once; none for a closed form."""
    ropes = ropes_of(model)
    return list({id(p): p for rope in ropes for p in rope.scalings.parameters()}.values())


def _way_on(folder: Path) -> str:
    last = _last_complete(folder)
    where = f"goes on from {last}" if last else "starts anew, there being no checkpoint yet"
    return f"the same command {where}"


def _last_complete(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; unfinished ones are removed."""
    while folder.is_dir():
        last = get_last_checkpoint(str(folder))
        if last is None or (Path(last) / _COMPLETE).is_file():
            return last
        shutil.rmtree(last)
    return None


def _last_undamaged(folder: Path) -> str | None:
    """The newest finished checkpoint, its files being those that were written."""
    last = _last_complete(folder)
    if last is not None:
        _require_undamaged(Path(last))
    return last


def _require_undamaged(checkpoint: Path) -> None:
    try:
        recorded = read_json(checkpoint / _COMPLETE).get("sha256", {})
        require_digests(checkpoint, recorded)
    except (CheckpointError, AttributeError) as error:
        raise CheckpointError(
            f"cannot go on from {checkpoint}: {error}; delete that folder to go on from the one"
            " before it"
        ) from None


class _Progress(TrainerCallback):
    """A bar with loss and speed, and the same numbers as lines of JSON in a file."""

    def __init__(self, trainer: ExtensionTrainer, log: Path, console: Console) -> None:
        self.trainer, self.log = trainer, log
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(
            "training", total=trainer.config.steps, loss=math.nan, speed=math.nan
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.start()
        self.started = time.monotonic()
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        seconds = time.monotonic() - self.started
        speed = self.trainer.tokens_seen * self.trainer.args.world_size / max(seconds, 1e-9)
        self.progress.update(self.task, completed=state.global_step, loss=logs["loss"], speed=speed)
        record = {
            "step": state.global_step,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(speed),
            **logs,
        }
        with output_errors(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab+") as file:
                # Half a line that an interruption left must not swallow this one.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")
                file.write(json.dumps(record).encode() + b"\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
