"""The model that a command measures, and the training-free rivals beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .config import ClexConfig
from .errors import ConfigError
from .evaluation.perplexity import as_method
from .hf.checkpoint import base_name, is_checkpoint, load
from .hf.extend import config_of
from .hf.models import load_base


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `load_measured` found.

    Attributes:
        source: name of the plain model.
        plain: the plain model.
        extended: the extended one, where the name was that of a result of ``clex extend``.
        config: of the extended model, or the range in which a plain one is measured.
        native_length: tokens that the plain model was trained to read.
        rivals: row name to config; ``None`` is the model as it is.
    """

    source: str
    plain: nn.Module
    extended: nn.Module | None
    config: ClexConfig
    native_length: int
    rivals: dict[str, ClexConfig | None]

    @property
    def own_name(self) -> str:
        """What the rows of the extended model are called."""
        return own_name(self.config.method, self.rivals)


def load_measured(
    name: str,
    rivals: Sequence[str],
    *,
    max_scale: float,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Measured:
    """Load a model and check that each rival suits it, before anything is measured.

    Args:
        name: a plain model, or a folder that `clex.load` reads.
        rivals: training-free methods; ``base`` is the model as it is.
        max_scale: longest scale of a plain model; an extended one brings its own.
        device: where the models go.
        dtype: of the weights; bfloat16 on a GPU and float32 elsewhere if not given.

    Raises:
        ClexError: the model cannot be loaded, a rival does not suit it, or nothing is to be
            measured.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    extended = load(name, dtype=dtype, device=device) if is_checkpoint(name) else None
    if extended is None and not rivals:
        raise ConfigError("nothing to measure: give --rivals")
    source = name if extended is None else base_name(name)
    plain = load_base(source, dtype=dtype, device=device)
    with as_method(plain, ClexConfig(method="none", max_scale=max_scale)) as probe:
        config = config_of(probe if extended is None else extended)
    assert config.native_length is not None
    return Measured(
        source=source,
        plain=plain,
        extended=extended,
        config=config,
        native_length=config.native_length,
        rivals=training_free(plain, rivals, config),
    )


def training_free(
    plain: nn.Module, names: Sequence[str], config: ClexConfig
) -> dict[str, ClexConfig | None]:
    """Closed-form rivals of an extension: same native length and range, t not rounded.

    Raises:
        ClexError: one does not suit the model.
    """
    rivals = {
        name: None
        if name == "base"
        else ClexConfig(
            method=name,
            native_length=config.native_length,
            max_scale=config.max_scale,
            layer_types=config.layer_types,
            grid="none",
        )
        for name in names
    }
    for rival in rivals.values():
        with as_method(plain, rival):
            pass
    return rivals


def own_name(method: str, rivals: Sequence[str] | dict[str, ClexConfig | None]) -> str:
    """A trained method beside its training-free self needs a row name of its own."""
    return f"{method}, trained" if method in rivals else method
