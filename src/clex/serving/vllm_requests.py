"""Which length class each request of a vLLM batch has.

vLLM tells its logits processors which request stands in which row of the batch, before each forward
pass. This one leaves the logits alone and keeps the table that the model looks into. It is loaded
by name (`PROCESSOR`) and not by an entry point, so that servers of other models never meet it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ..errors import ConfigError
from .length_classes import CONFIG_KEY, REQUEST_KEY, LengthClasses, require_scale


def classes_of(vllm_config: Any) -> LengthClasses:
    """The length classes in the config.json that a server was started with.

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    values = getattr(vllm_config.model_config.hf_config, CONFIG_KEY, None)
    if values is None:
        raise ConfigError(
            f"{vllm_config.model_config.model} is not an export with several scales: its"
            f" config.json has no {CONFIG_KEY}; write one with clex export --scales"
        )
    return LengthClasses.from_dict(values)


class RequestScales(LogitsProcessor):
    """Where the rows of each request's length class begin in the stacked table of cos and sin.

    Attributes:
        offsets: (max_num_seqs,) int64 on the device of the model, by row of the batch. Written in
            place between forward passes, so that CUDA graphs see it.
    """

    # The newest one of this process: the model is made after it, and takes it.
    latest: ClassVar[RequestScales | None] = None

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vllm_config = vllm_config
        self._classes = classes_of(vllm_config)
        self._host = np.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=np.int64)
        self.offsets: Tensor = torch.from_numpy(self._host).to(device, copy=True)
        RequestScales.latest = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose wish is no scale, before it reaches the batch."""
        wanted = (sampling_params.extra_args or {}).get(REQUEST_KEY)
        if wanted is not None:
            require_scale(wanted)

    def is_argmax_invariant(self) -> bool:
        """True: logits stay as they are."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """The same logits."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that came and moved; rows that are empty now are written before use."""
        if batch_update is None:
            return
        host, offsets = self._host, self._classes.offsets
        for row, params, prompt, _ in batch_update.added:
            tokens = None if prompt is None else len(prompt)
            wanted = (params.extra_args or {}).get(REQUEST_KEY)
            host[row] = offsets[self._classes.choose(tokens, params.max_tokens, wanted)]
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                host[[source, target]] = host[[target, source]]
            else:
                host[target] = host[source]
        self.offsets.copy_(torch.from_numpy(host))
