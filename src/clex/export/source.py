"""What is exported: a result of ``clex extend``, or a plain model under a closed form."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ClexConfig
from ..errors import CheckpointError, ConfigError
from ..hf.checkpoint import base_name, is_checkpoint, load, read_about
from ..hf.extend import config_of, extend, restore
from ..hf.models import load_base, load_host_config, load_tokenizer
from .hf import MARK


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export.

    Attributes:
        name: as the user gave it.
        base: name or folder of the plain model.
        weights: what was trained beside the dynamics: ``none``, ``adapter`` or ``full``.
        clex: its extension.
        sha256: of the files of a result of ``clex extend``, by name.
    """

    name: str
    base: str
    weights: str
    clex: ClexConfig
    sha256: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str | Path, clex: ClexConfig | None = None) -> Source:
        """Look at a source without loading its weights.

        Args:
            name: a result of ``clex extend``, or a plain model.
            clex: the extension of a plain model.

        Raises:
            ConfigError: a plain model without a method, or a result with another one.
            CheckpointError: it is an export already.
        """
        if is_checkpoint(name):
            if clex is not None:
                raise ConfigError(f"{name} has a method of its own; leave out --method")
            about = read_about(name)
            weights = str(about.get("weights", "none"))
            base = str(about.get("base_model") or name) if weights == "full" else base_name(name)
            clex = ClexConfig.from_dict(about["clex"])
            recorded = about.get("sha256")
            digests = recorded if isinstance(recorded, dict) else {}
        else:
            if clex is None:
                raise ConfigError(
                    f"{name} is not a result of clex extend; give --method for a plain model"
                )
            base, weights, digests = str(name), "none", {}
        found = cls(name=str(name), base=base, weights=weights, clex=clex, sha256=digests)
        if hasattr(found.host_config(), MARK):
            raise CheckpointError(
                f"{found._plain()} is an export of clex already: its queries would be scaled twice"
            )
        return found

    def _plain(self) -> str:
        return self.name if self.weights == "full" else self.base

    def host_config(self) -> Any:
        """The plain model's config of transformers.

        Raises:
            ConfigError: it cannot be read.
        """
        return load_host_config(self._plain())

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The extended model on the CPU, in evaluation mode, any adapter merged into its weights.

        Args:
            dtype: of the weights; that of the stored ones if not given. An adapter is merged in
                float32, and the sum rounded once.
        """
        stored = dtype or self.stored_dtype()
        first = torch.float32 if self.weights == "adapter" else stored
        if is_checkpoint(self.name):
            model: Any = load(self.name, dtype=first)
        else:
            model = extend(load_base(self.name, dtype=first), self.clex)
        if self.weights == "adapter":
            model = model.merge_and_unload()
        return model.to(stored).eval()

    def stored_dtype(self) -> torch.dtype:
        """Of the weights on disk; float32 where the config does not say."""
        dtype = getattr(self.host_config(), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def load_plain(self, dtype: torch.dtype) -> nn.Module:
        """The plain base model, which knows nothing of any training."""
        if self.weights == "full" and self.base == self.name:
            return restore(self.load(dtype))
        return load_base(self.base, dtype=dtype)

    def tokenizer(self) -> Any:
        """The tokenizer, from the result itself if it has one, or else from the base model.

        ``None`` for models that have none.
        """
        own = is_checkpoint(self.name) and (Path(self.name) / "tokenizer_config.json").is_file()
        try:
            return load_tokenizer(self.name if own else self.base)
        except ConfigError:
            return None

    def resolved(self, model: nn.Module) -> dict[str, Any]:
        """The extension's settings as plain JSON, with what was read of the model."""
        settings: dict[str, Any] = json.loads(json.dumps(config_of(model).to_dict()))
        return settings
