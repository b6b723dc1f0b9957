"""Token losses in bounded memory, for any causal language model.

Full logits of a 64k-token text over a 49k vocabulary are 12.8 GB. Here the model runs once without
its logits, and the output head is applied to a few thousand hidden states at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError

# Logits held at any moment: 64 Mi float32 numbers, 256 MiB.
LOGITS_AT_ONCE = 2**26


class TokenLoss:
    """Losses of single tokens under a model whose logits are ``head(hidden)``.

    On its first call it compares the logits of the last token with the model's own, so that a model
    that does more than apply its head (scaling, a soft cap) is handled or refused, never wrong.

    Args:
        model: a causal language model, bare or wrapped (PEFT, DDP, compiled).
    """

    def __init__(self, model: nn.Module) -> None:
        self.plain: Any = getattr(model, "module", model)
        self.head: Any = self.plain.get_output_embeddings()
        self.decoder: Any = self.plain.get_decoder()
        config = self.plain.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._checked = False
        if self.head is None or self.decoder is None:
            raise UnsupportedModelError(f"{type(self.plain).__name__} has no output head")

    def __call__(
        self, model: nn.Module, input_ids: Tensor, last: int | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Losses of the last `last` tokens (all but the first if not given).

        Args:
            model: the model to call, wrapped as the training engine has it.
            input_ids: (B, T).
            last: number of tokens to score, at most T - 1.
            inputs: further arguments of the model, such as `position_ids`.

        Returns:
            Negative log-likelihoods in nats, float32, (B, last); and whether each token was the
            model's first choice, bool, (B, last).
        """
        last = last or input_ids.shape[1] - 1
        caught: list[Tensor] = []
        handle = self.decoder.register_forward_hook(
            lambda _module, _args, output: caught.append(output[0])
        )
        try:
            output = model(input_ids=input_ids, logits_to_keep=1, use_cache=False, **inputs)
        finally:
            handle.remove()
        hidden = caught[-1]
        if not self._checked:
            self._check(hidden[:, -1:], output.logits[:, -1:])
        hidden = hidden[:, -last - 1 : -1]
        targets = input_ids[:, -last:]
        size = max(1, LOGITS_AT_ONCE // (self.head.weight.shape[0] * len(input_ids)))
        losses, hits = [], []
        for part, wanted in zip(hidden.split(size, 1), targets.split(size, 1), strict=True):
            if torch.is_grad_enabled():
                # The logits of a part are made again in the backward pass, not kept.
                loss, hit = checkpoint(self._score, part, wanted, use_reentrant=False)
            else:
                loss, hit = self._score(part, wanted)
            losses.append(loss)
            hits.append(hit)
        return torch.cat(losses, dim=1), torch.cat(hits, dim=1)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden).float() * self.factor
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return loss.view(targets.shape), logits.detach().argmax(-1) == targets

    @torch.no_grad()
    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        ours, theirs = self._logits(hidden), logits.float()
        exact = hidden.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        tolerance = 1e-4 if exact else 0.05
        if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * theirs.std().item()):
            raise UnsupportedModelError(
                f"{type(self.plain).__name__} does more to its logits than apply its head"
            )
        self._checked = True
