"""Saving an extended model and loading it again: JSON and safetensors, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import CheckpointError, ClexError, OutputError
from ..files import new_file, output_errors, read_json, write_json
from ..version import __version__
from .extend import config_of, extend, require_extension, restore
from .models import load_base
from .rotary import ScaledRope

CONFIG_FILE = "clex_config.json"
WEIGHTS_FILE = "clex.safetensors"
Weights = Literal["none", "adapter", "full"]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    weights: Weights = "full",
    base_model: str | None = None,
    tokenizer: Any = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an extended model so that `load` gives the same logits.

    The model's own files are those of the plain model: any program can read them, and without clex
    they are the model at t = 1. `clex_config.json` is written last, so a folder without it is not
    a finished checkpoint.

    Args:
        model: an extended model, or a PEFT model around one.
        folder: made if it does not exist; files of the same names are replaced.
        weights: what is saved beside the extension: ``"full"`` weights, the PEFT ``"adapter"``, or
            ``"none"`` for frozen models, which need a few kilobytes.
        base_model: name or folder of the plain model; needed by `load` unless weights are full.
        tokenizer: saved along if given.
        state: the whole state dictionary of a model whose weights an engine has cut up.

    Returns:
        The folder.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    rope = require_extension(model)
    with _writing(folder):
        return _save(model, rope, folder, weights, base_model, tokenizer, state)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Safetensors writes by itself and tells of the system's error in words only."""
    try:
        with output_errors(folder):
            yield
    except SafetensorError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error


def _save(
    model: nn.Module,
    rope: ScaledRope,
    folder: Path,
    weights: Weights,
    base_model: str | None,
    tokenizer: Any,
    state: Mapping[str, Tensor] | None,
) -> Path:
    if weights != "none":
        target: Any = model
        if weights == "adapter" and not isinstance(model, peft.PeftModel):
            raise CheckpointError(f"{type(model).__name__} has no adapter to save")
        state = model.state_dict() if state is None else state
        if weights == "full":
            state = {k: v for k, v in state.items() if not _is_ours(k)}
        target.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    digest = save_extension_state(model, folder / WEIGHTS_FILE)
    write_json(
        folder / CONFIG_FILE,
        {
            "clex": config_of(model).to_dict(),
            "weights": weights,
            "base_model": base_model,
            "sha256": digest,
            "rope": _fingerprint(rope),
            "versions": {
                "clex": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
        },
    )
    return folder


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds an extension that `save` finished."""
    return (Path(folder) / CONFIG_FILE).is_file()


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load an extended model.

    Args:
        folder: written by `save` or by ``clex extend``.
        model: a plain model to extend; if not given, the weights in the folder, or else the base
            model that the folder names, are loaded.
        dtype: of the weights, where they are loaded here.
        device: where they go, likewise.

    Returns:
        The extended model, in evaluation mode; a PEFT model where the folder holds an adapter.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model.
    """
    folder = Path(folder)
    about = _read_about(folder)
    weights = about.get("weights", "none")
    if model is None:
        source = folder if weights == "full" else about.get("base_model")
        if not source:
            raise CheckpointError(f"{folder} names no base model; pass the model to clex.load")
        model = load_base(source, dtype=dtype, device=device)
    _load_extension(folder, about, model)
    if weights == "adapter":
        model = peft.PeftModel.from_pretrained(model, folder)
    return model.eval()


def _read_about(folder: Path) -> dict[str, Any]:
    about = read_json(folder / CONFIG_FILE)
    if not isinstance(about, dict) or not isinstance(about.get("clex"), dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} has no 'clex' section")
    return about


def _load_extension(folder: Path, about: dict[str, Any], model: nn.Module) -> None:
    """Extend `model` as `folder` says; it stays plain where that fails."""
    extend(model, ClexConfig.from_dict(about["clex"]))
    try:
        fingerprint = _fingerprint(require_extension(model))
        if about.get("rope") != fingerprint:
            raise CheckpointError(
                f"{folder} was made for another model: rotary {about.get('rope')}, this one has"
                f" {fingerprint}"
            )
        load_extension_state(model, folder / WEIGHTS_FILE, digest=about.get("sha256"))
    except ClexError:
        restore(model)
        raise


def require_loadable(folder: str | Path, model: nn.Module) -> None:
    """Check that `load` would accept `folder` for the plain `model`, which stays plain.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model.
    """
    folder = Path(folder)
    _load_extension(folder, _read_about(folder), model)
    restore(model)


def extension_state(model: nn.Module) -> dict[str, Tensor]:
    """The learned numbers of an extended model, float32 on the CPU, by name."""
    state = require_extension(model).scalings.state_dict()
    if not state:
        # safetensors files may be empty, but an explicit marker reads better than nothing.
        return {"closed_form": torch.zeros(0)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_extension_state(model: nn.Module, file: Path) -> str:
    """Write the learned numbers of an extended model; returns the SHA-256 of the file."""
    with new_file(file) as temporary:
        save_file(extension_state(model), temporary, metadata={"format": "pt"})
        return hashlib.sha256(temporary.read_bytes()).hexdigest()


def load_extension_state(model: nn.Module, file: Path, digest: str | None = None) -> None:
    """Put the numbers of `file` into an extended model.

    Raises:
        CheckpointError: the file is missing or damaged, or has other names or shapes.
    """
    try:
        if digest and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the recorded one")
        state = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"no {file.name} in {file.parent}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    state.pop("closed_form", None)
    _require_same_names(require_extension(model).scalings.state_dict(), state, file)
    for rope in (m for m in model.modules() if isinstance(m, ScaledRope)):
        rope.scalings.load_state_dict(state)


def _require_same_names(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path
) -> None:
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{file} does not fit its config: missing {missing or 'nothing'},"
            f" unexpected {extra or 'nothing'}"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensor.shape)},"
                f" the model needs {tuple(wanted[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name} holds numbers that are not finite")


def _is_ours(key: str) -> bool:
    return ".scalings." in key or ".stock." in key


def _fingerprint(rope: ScaledRope) -> dict[str, dict[str, Any]]:
    """What must agree between a checkpoint and the model it is loaded into."""
    result = {}
    for key, module in rope.scalings.items():
        scaling: Any = module
        inv_freq = scaling.inv_freq_native.detach().cpu()
        result[key] = {
            "rotary_dim": scaling.spec.rotary_dim,
            # Seven digits: the vector is computed anew on each machine, the last bit may differ.
            "slowest": f"{inv_freq[inv_freq > 0].min().item():.5e}",
        }
    return result


def load_config(folder: str | Path) -> ClexConfig:
    """The config of the extension in `folder`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return ClexConfig.from_dict(_read_about(Path(folder))["clex"])


def base_name(folder: str | Path) -> str:
    """Name or folder of the plain model that an extension in `folder` was made from.

    Raises:
        CheckpointError: it names none.
    """
    name = read_json(Path(folder) / CONFIG_FILE).get("base_model")
    if not name:
        raise CheckpointError(f"{folder} names no base model")
    return str(name)
