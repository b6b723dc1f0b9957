"""Checkpoints of the authors' own code (DAMO-NLP-SG/CLEX), turned into ours.

Their folders are those of a plain LLaMA, Mixtral or Phi-2, with a section ``rope_scaling`` of type
``clex`` in the config and with a `clex_layer` among the weights. It holds two matrices,
``ode_up_proj`` W1 (F, lambda d) and ``ode_down_proj`` W2 (lambda d, F), applied as
``act(z @ W1) @ W2``; `nn.Linear` keeps them transposed.
"""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import CheckpointError, ConfigError, OutputError
from ..files import new_folder, read_json, write_json
from .checkpoint import CONFIG_FILE, save, weight_digests
from .extend import extend, require_extension
from .rotary import ALL_LAYERS
from .skeleton import skeleton_of

# The families that the authors released; transformers has the plain form of each.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi": "PhiForCausalLM",
}
INDEX_FILE = "model.safetensors.index.json"
UP, DOWN = "ode_up_proj", "ode_down_proj"

# Config entries of the authors' classes that the plain model has no use for.
_THEIR_SETTINGS = ("rope_scaling", "auto_map", "use_flashattn", "log_scale", "data_length")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
# How far off frequencies may be, relative: to stop, without a warning, and at all. Rounding in
# float32 alone gives 1e-6.
_SETTLED, _SAME, _USELESS = 3e-6, 1e-5, 1e-2
MOST_STEPS = 2048


@dataclass(frozen=True)
class _Official:
    """What was read of a checkpoint, before anything is written."""

    folder: Path
    host: Mapping[str, Any]
    scaling: Mapping[str, Any]
    files: Mapping[str, list[str]]
    up: Tensor
    down: Tensor
    inv_freq: Tensor | None


def import_official(
    folder: str | Path, out: str | Path, *, native_length: int | None = None
) -> Path:
    """Turn a checkpoint of the authors' code into a folder that `clex.load` reads.

    The extension has preset ``paper``: integer scales, the released field with `param_factor` as
    width and `act` as activation, `max_factor` as largest scale. `time_dt`, the step of their
    solver, is not kept; the number of our steps is doubled from 64 until the frequencies at all
    integer t are those of a fine solution in float64. Weights are copied bit for bit, without the
    CLEX layer.

    Args:
        folder: with config.json and weights as safetensors, in one file or several.
        out: made anew; must not hold anything.
        native_length: unit of t in tokens; `original_max_position_embeddings` or else
            `max_position_embeddings` of the config if not given.

    Returns:
        The folder written.

    Raises:
        CheckpointError: something is missing, damaged, or contradicts itself; the message says
            what, and nothing is written.
        OutputError: `out` is not empty or cannot be written.
    """
    source, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty; give a new folder")
    official = _read(source)
    host = _host_config(official)
    with _as_checkpoint_error(source):
        model = _extended(official, host, native_length)
    with new_folder(out) as temporary:
        host.save_pretrained(temporary)
        _copy_weights(official, temporary)
        _require_whole(temporary, source)
        for pattern in _TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, temporary / file.name)
        save(model, temporary, weights="none")
        # The skeleton has no weights to save; those that belong to it lie beside already.
        about = {"weights": "full", "sha256": weight_digests(temporary)}
        write_json(temporary / CONFIG_FILE, {**read_json(temporary / CONFIG_FILE), **about})
    return out


def _read(folder: Path) -> _Official:
    host = read_json(folder / "config.json")
    if not isinstance(host, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a model's config")
    scaling = host.get("rope_scaling")
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if not isinstance(scaling, dict) or kind != "clex":
        raise CheckpointError(
            f"{folder} is no CLEX checkpoint: rope_scaling in its config is {scaling!r}, not of"
            " type 'clex'"
        )
    missing = [name for name in ("max_factor", "param_factor") if name not in scaling]
    if missing:
        raise CheckpointError(f"{folder}: rope_scaling has no {' and no '.join(missing)}")
    if host.get("model_type") not in ARCHITECTURES:
        raise CheckpointError(
            f"{folder}: model_type is {host.get('model_type')!r} (valid:"
            f" {', '.join(ARCHITECTURES)})"
        )
    files = _weight_files(folder)
    found = _read_clex_layers(folder, files)
    return _Official(
        folder=folder,
        host=host,
        scaling=scaling,
        files=files,
        up=_projection(folder, found, UP, host),
        down=_projection(folder, found, DOWN, host),
        inv_freq=next((t for key, t in found.items() if key.endswith(".inv_freq")), None),
    )


def _weight_files(folder: Path) -> dict[str, list[str]]:
    """Names of the weight files, and the tensors in each."""
    index, single = folder / INDEX_FILE, folder / "model.safetensors"
    if index.is_file():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted(set(placed.values()))
    elif single.is_file():
        placed, names = {}, [single.name]
    elif pickles := sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read; convert"
            " it to safetensors first (load it where you trust it and save_pretrained)"
        )
    else:
        raise CheckpointError(f"no model.safetensors and no {INDEX_FILE} in {folder}")
    files = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the weight file {name}")
        with _open(folder / name) as tensors:
            files[name] = list(tensors.keys())
    lost = [key for key, name in placed.items() if key not in files[name]]
    if lost:
        raise CheckpointError(f"{folder} lacks tensors that its index names: {_some(lost)}")
    return files


def _read_clex_layers(folder: Path, files: Mapping[str, list[str]]) -> dict[str, Tensor]:
    found = {}
    for name, keys in files.items():
        with _open(folder / name) as tensors:
            found.update({key: tensors.get_tensor(key) for key in keys if _is_clex(key)})
    return found


def _projection(
    folder: Path, found: Mapping[str, Tensor], name: str, host: Mapping[str, Any]
) -> Tensor:
    """The matrix called `name`, float32, which must be the same wherever it is stored."""
    prefixes = sorted({key.rsplit(".", 1)[0] for key in found if key.endswith((UP, DOWN))})
    if not prefixes:
        raise CheckpointError(f"{folder} holds no ...clex_layer.proj_func.{UP} and no ...{DOWN}")
    per_layer = [p for p in prefixes if ".layers." in p]
    if per_layer:
        stem, rest = per_layer[0].split(".layers.")
        after = rest.split(".", 1)[1]
        wanted = range(int(host.get("num_hidden_layers", len(per_layer))))
        prefixes = sorted({*prefixes, *(f"{stem}.layers.{i}.{after}" for i in wanted)})
    missing = [f"{p}.{name}" for p in prefixes if f"{p}.{name}" not in found]
    if missing:
        raise CheckpointError(f"{folder} is not whole: it lacks {_some(missing)}")
    first, *others = (f"{prefix}.{name}" for prefix in prefixes)
    for other in others:
        if not torch.equal(found[first], found[other]):
            raise CheckpointError(f"{folder}: {other} differs from {first}; CLEX shares one field")
    if not found[first].isfinite().all():
        raise CheckpointError(f"{folder}: {first} holds numbers that are not finite")
    return found[first].float()


def _host_config(official: _Official) -> transformers.PreTrainedConfig:
    """The config of the plain model: default rotary with the model's own base."""
    values = {k: v for k, v in official.host.items() if k not in _THEIR_SETTINGS}
    kind = values.pop("model_type")
    values["architectures"] = [ARCHITECTURES[kind]]
    with _as_checkpoint_error(official.folder):
        return transformers.AutoConfig.for_model(kind, **values)


def _extended(
    official: _Official, host: transformers.PreTrainedConfig, native_length: int | None
) -> nn.Module:
    """A model without weights that is extended with what was read."""
    theirs, given = official.scaling, official.host
    model = skeleton_of(host)
    config = ClexConfig(
        preset="paper",
        max_scale=theirs["max_factor"],
        width=theirs["param_factor"],
        # The first release, of October 2023, had SiLU and no such setting.
        activation=theirs.get("act", "silu"),
        native_length=native_length
        or theirs.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or given.get("max_position_embeddings"),
    )
    scaling: Any = require_extension(extend(model, config)).scalings[ALL_LAYERS]
    up, down = scaling.field.up.weight, scaling.field.down.weight
    _require_shape(official, UP, official.up.T, up)
    _require_shape(official, DOWN, official.down.T, down)
    _require_same_base(official, scaling)
    with torch.no_grad():
        up.copy_(official.up.T)
        down.copy_(official.down.T)
        _settle(scaling, official.folder)
    return model


def _settle(scaling: Any, folder: Path) -> None:
    """Take as many steps as the frequencies at all integer t need, no fewer than the preset has.

    They are measured against an adaptive solution in float64. Fields far stronger than any that was
    published end in float32 rounding; the best number of steps is taken then, with a warning.

    Raises:
        CheckpointError: no number of steps gives frequencies that can be relied on.
    """
    t = torch.arange(1.0, scaling.config.max_scale + 1)
    exact = _in_double(copy.deepcopy(scaling))
    exact.config = exact.config.replace(solver="dopri5")
    try:
        truth: Tensor = exact.ratio(t.double())
    except ConfigError as error:
        raise CheckpointError(_unsolvable(folder)) from error
    steps, best = scaling.config.steps, (math.inf, scaling.config.steps)
    while steps < MOST_STEPS and best[0] > _SETTLED:
        scaling.config = scaling.config.replace(steps=steps)
        apart = float((scaling.ratio(t) / truth - 1).abs().max())
        best = min(best, (math.inf if math.isnan(apart) else apart, steps))
        steps *= 2
    apart, steps = best
    if apart > _USELESS:
        raise CheckpointError(_unsolvable(folder))
    if apart > _SAME:
        warnings.warn(f"{folder}: its frequencies are exact to {apart:.0e} only", stacklevel=4)
    scaling.config = scaling.config.replace(steps=steps)


def _unsolvable(folder: Path) -> str:
    return f"{folder}: its dynamics cannot be solved in float32"


def _in_double(scaling: Any) -> Any:
    """Every number of `scaling` as float64, past `Scaling._apply`, which ignores casts."""
    for module in scaling.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.double()
    for parameter in scaling.parameters():
        parameter.data = parameter.data.double()
    return scaling


def _require_shape(official: _Official, name: str, given: Tensor, wanted: Tensor) -> None:
    if given.shape != wanted.shape:
        raise CheckpointError(
            f"{official.folder}: {name} has shape {tuple(given.T.shape)}, the config asks for"
            f" {tuple(wanted.T.shape)}"
        )


def _require_same_base(official: _Official, scaling: Any) -> None:
    """Their classes for LLaMA and Mixtral ignore `rope_theta`: the stored vector is what was used.

    Raises:
        CheckpointError: it has another base than the config.
    """
    if official.inv_freq is None:
        return
    stored, own = official.inv_freq.float(), scaling.inv_freq_native
    # bfloat16 rounds by up to 0.4 %; another base is off by far more in the slowest dimension.
    if stored.shape != own.shape or not torch.allclose(stored, own, rtol=0.01, atol=0):
        raise CheckpointError(
            f"{official.folder}: the weights were made with other frequencies (slowest"
            f" {stored.flatten()[-1].item():.3g}) than rope_theta {scaling.spec.rope_theta:g} of"
            f" the config gives ({own[-1].item():.3g}); correct rope_theta in config.json"
        )


def _copy_weights(official: _Official, target: Path) -> None:
    """The weight files without the CLEX layer, one in memory at a time."""
    placed, size = {}, 0
    for name, keys in official.files.items():
        kept = [key for key in keys if not _is_theirs(key)]
        with _open(official.folder / name) as tensors:
            state = {key: tensors.get_tensor(key) for key in kept}
        size += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if not state:
            continue  # a file of the CLEX layer alone
        save_file(state, target / name, metadata={"format": "pt"})
        placed.update(dict.fromkeys(kept, name))
    if (official.folder / INDEX_FILE).is_file():
        write_json(target / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": placed})


def _require_whole(folder: Path, source: Path) -> None:
    """Check on the meta device that the plain model finds all its weights in `folder`.

    Raises:
        CheckpointError: some are missing or have other shapes; transformers itself would only warn
            and leave random numbers.
    """
    log = transformers.logging
    loud = log.get_verbosity()
    log.set_verbosity_error()
    try:
        with _as_checkpoint_error(source):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", output_loading_info=True
            )
    finally:
        log.set_verbosity(loud)
    _, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{source} is not a whole model: it lacks {_some(missing)}")


@contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    """A setting that we or transformers refuse is a fault of the checkpoint here."""
    try:
        yield
    except (ConfigError, ValueError, TypeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: {lines[0]}") from error


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _is_clex(key: str) -> bool:
    return "clex_layer." in key


def _is_theirs(key: str) -> bool:
    # Older releases of transformers stored a vector for each layer, which later ones do not know.
    return _is_clex(key) or key.endswith("rotary_emb.inv_freq")


def _some(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (", ".join(listed[:3]) or "nothing") + more
