"""Saving an extended model and loading it again: JSON and safetensors, nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ClexConfig
from ..digests import digests_of, require_digests
from ..errors import CheckpointError, ClexError, unknown
from ..files import new_files, read_json, write_json
from ..version import __version__
from .adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from .extend import config_of, extend, require_extension, restore
from .models import assets_folder, load_base
from .rotary import ScaledRope

CONFIG_FILE = "clex_config.json"
WEIGHTS_FILE = "clex.safetensors"
# Results that come with the package: dynamics alone, for the plain model that they name.
READY_MADE = ("smollm2-dynamics", "smollm2-layers")
Weights = Literal["none", "adapter", "full"]

# Weight files of transformers.
_HOST_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


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
    if weights == "adapter" and not isinstance(model, peft.PeftModel):
        raise CheckpointError(f"{type(model).__name__} has no adapter to save")
    with new_files(folder, last=CONFIG_FILE) as temporary:
        _save(model, rope, temporary, weights, base_model, tokenizer, state)
        if weights == "full":
            # One file or several: an older one that is left over would be read in place of ours.
            for file in folder.iterdir():
                if _HOST_WEIGHTS.fullmatch(file.name) and not (temporary / file.name).exists():
                    file.unlink()
    return folder


def _save(
    model: nn.Module,
    rope: ScaledRope,
    folder: Path,
    weights: Weights,
    base_model: str | None,
    tokenizer: Any,
    state: Mapping[str, Tensor] | None,
) -> None:
    if weights != "none":
        target: Any = model
        state = model.state_dict() if state is None else state
        if weights == "full":
            state = {k: v for k, v in state.items() if not _is_ours(k)}
        # Gathered copies of tied weights no longer share memory, by which the host knows them.
        once = dict(target.named_parameters())
        tied = dict(target.named_parameters(remove_duplicate=False)).keys() - once.keys()
        state = {k: v for k, v in state.items() if k not in tied}
        target.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_extension_state(model, folder / WEIGHTS_FILE)
    write_json(
        folder / CONFIG_FILE,
        {
            "clex": config_of(model).to_dict(),
            "weights": weights,
            "base_model": base_model,
            "sha256": weight_digests(folder),
            "rope": _fingerprint(rope),
            "versions": {
                "clex": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
        },
    )


def weight_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all weight files in `folder` that a checkpoint may consist of."""
    names = [file.name for file in folder.iterdir()]
    ours = (WEIGHTS_FILE, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    return digests_of(folder, [n for n in names if n in ours or _HOST_WEIGHTS.fullmatch(n)])


def result_folder(name: str | Path) -> Path:
    """Where a result is: a folder, or one of `READY_MADE` by its name."""
    return assets_folder() / str(name) if str(name) in READY_MADE else Path(name)


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` (see `result_folder`) holds an extension that `save` finished."""
    # False for any text that is no path.
    return os.path.isfile(result_folder(folder) / CONFIG_FILE)


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool | None = None,
) -> nn.Module:
    """Load an extended model.

    Args:
        folder: written by `save` or by ``clex extend``; or a name of `READY_MADE`.
        model: a plain model to extend; if not given, the weights in the folder, or else the base
            model that the folder names, are loaded.
        dtype: of the weights, where they are loaded here.
        device: where they go, likewise.
        trust_remote_code: run code that the plain model brings along; see `load_base`.

    Returns:
        The extended model, in evaluation mode; a PEFT model where the folder holds an adapter.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model.
    """
    folder = result_folder(folder)
    about = read_about(folder)
    weights = about.get("weights", "none")
    if model is None:
        source = folder if weights == "full" else about.get("base_model")
        if not source:
            raise CheckpointError(f"{folder} names no base model; pass the model to clex.load")
        if weights == "full":
            require_whole(folder, about)
        model = load_base(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _load_extension(folder, about, model)
    if weights == "adapter":
        try:
            require_whole(folder, about)
            model = load_adapter(model, folder)
        except CheckpointError:
            restore(model)
            raise
    return model.eval()


def read_about(folder: str | Path) -> dict[str, Any]:
    """What `save` wrote beside the weights in `folder` (see `result_folder`).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = result_folder(folder)
    about = read_json(folder / CONFIG_FILE)
    if not isinstance(about, dict) or not isinstance(about.get("clex"), dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} has no 'clex' section")
    if about.get("weights", "none") not in get_args(Weights):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: " + unknown("weights", about["weights"], get_args(Weights))
        )
    if not isinstance(about.get("base_model"), str | None):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model is {about['base_model']!r}, no name"
        )
    return about


def require_whole(
    folder: Path, about: Mapping[str, Any], names: Iterable[str] | None = None
) -> None:
    """Check weight files of `folder` against the SHA-256 in `about`.

    Args:
        about: from `read_about`.
        names: of the files; all if not given.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    recorded = about.get("sha256") or {}
    # Until November 2026 it was the digest of the extension alone.
    recorded = {WEIGHTS_FILE: recorded} if isinstance(recorded, str) else recorded
    require_digests(folder, recorded, names)


def _load_extension(folder: Path, about: dict[str, Any], model: nn.Module) -> None:
    """Extend `model` as `folder` says; it stays plain where that fails."""
    require_whole(folder, about, [WEIGHTS_FILE])
    extend(model, ClexConfig.from_dict(about["clex"]))
    try:
        fingerprint = _fingerprint(require_extension(model))
        if about.get("rope") != fingerprint:
            raise CheckpointError(
                f"{folder} was made for another model: rotary {about.get('rope')}, this one has"
                f" {fingerprint}"
            )
        load_extension_state(model, folder / WEIGHTS_FILE)
    except ClexError:
        restore(model)
        raise


def require_loadable(folder: str | Path, model: nn.Module) -> None:
    """Check that `load` would accept `folder` for the plain `model`, which stays plain.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model.
    """
    folder = result_folder(folder)
    _load_extension(folder, read_about(folder), model)
    restore(model)


def extension_state(model: nn.Module) -> dict[str, Tensor]:
    """The learned numbers of an extended model, float32 on the CPU, by name."""
    state = require_extension(model).scalings.state_dict()
    if not state:
        # safetensors files may be empty, but an explicit marker reads better than nothing.
        return {"closed_form": torch.zeros(0)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_extension_state(model: nn.Module, file: Path) -> None:
    """Write the learned numbers of an extended model."""
    save_file(extension_state(model), file, metadata={"format": "pt"})


def load_extension_state(model: nn.Module, file: Path) -> None:
    """Put the numbers of `file` into an extended model.

    Raises:
        CheckpointError: the file is missing or damaged, or has other names or shapes.
    """
    try:
        state = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"no {file.name} in {file.parent}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    state.pop("closed_form", None)
    # Files made before 2026-11-25 hold the numbers of the temperature without a dimension.
    state = {name: tensor.reshape(tensor.shape or (1,)) for name, tensor in state.items()}
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
    return ClexConfig.from_dict(read_about(folder)["clex"])


def base_name(folder: str | Path) -> str:
    """Name or folder of the plain model that an extension in `folder` was made from.

    Raises:
        CheckpointError: it names none.
    """
    name = read_about(folder).get("base_model")
    if not name:
        raise CheckpointError(f"{folder} names no base model; save it with base_model=NAME")
    return str(name)
