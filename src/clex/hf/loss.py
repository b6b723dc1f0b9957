"""Token losses in bounded memory, for any causal language model.

Full logits of a 64k-token text over a 49k vocabulary are 12.8 GB. Here the output head turns a few
thousand hidden states at a time into losses and forgets their logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError

# Logits held at any moment: 64 Mi float32 numbers, 256 MiB.
LOGITS_AT_ONCE = 2**26
# Target of a token that is not scored.
UNSCORED = -100


class TokenLoss:
    """Losses of single tokens under a model whose logits are ``head(hidden)``.

    The losses are made inside the one call of the head that belongs to the model's own forward
    pass: that is when engines that cut weights up (FSDP2, ZeRO-3) have them whole.

    Before its first call it compares the logits of a token with the model's own, so that a model
    that does more than apply its head (scaling, a soft cap) is handled or refused, never wrong.

    Args:
        model: a causal language model, bare or wrapped (PEFT, DDP, compiled).
    """

    def __init__(self, model: nn.Module) -> None:
        self.plain: Any = getattr(model, "module", model)
        self.head: Any = self.plain.get_output_embeddings()
        config = self.plain.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._checked = False
        if self.head is None:
            raise UnsupportedModelError(f"{type(self.plain).__name__} has no output head")
        # One object for good, or a compiled model would be compiled anew in each call.
        self._losses_for_logits = torch.compiler.disable(self._score_all)
        self._targets: Tensor | None = None
        self._hits: Tensor | None = None

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        last: int | None = None,
        targets: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Losses of the last `last` tokens (all but the first if not given).

        Args:
            model: the model to call, wrapped as the training engine has it.
            input_ids: (B, T).
            last: number of tokens to score, at most T - 1.
            targets: (B, T), the token that follows each of `input_ids`, `UNSCORED` where it does
                not count. For a piece of a text that is cut across processes; replaces `last`.
            inputs: further arguments of the model, such as `position_ids`.

        Returns:
            Negative log-likelihoods in nats, float32, (B, last); and whether each token was the
            model's first choice, bool, (B, last), or (B, 0) where gradients are made: training
            does not ask. With `targets` (B, T), 0 where not scored.
        """
        self.check(input_ids)
        cut = targets is not None
        if targets is None:
            last = last or input_ids.shape[1] - 1
            # The last hidden state predicts a token that is not there.
            targets = nn.functional.pad(input_ids[:, -last:], (0, 1), value=UNSCORED)
        with self._scoring(targets) as found:
            model(input_ids=input_ids, logits_to_keep=targets.shape[1], use_cache=False, **inputs)
        losses, hits = found
        return (losses, hits) if cut else (losses[:, :-1], hits[:, :-1])

    @contextmanager
    def _scoring(self, targets: Tensor) -> Iterator[list[Tensor]]:
        """Inside the block the head returns losses; a pass leaves them and the hits in the list."""
        before = self.head.__dict__.get("forward")
        found: list[Tensor] = []
        self._targets = targets
        self._logits_of, self.head.forward = self.head.forward, self._losses_for_logits

        def keep(_module: Any, _args: Any, output: Tensor) -> None:
            # What the hooks of sharding engines have made of it: they wait for its gradient.
            assert self._hits is not None
            found[:] = output[..., 0], self._hits

        handle = self.head.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()
            self._targets = self._hits = None
            del self.head.forward
            if before is not None:
                self.head.forward = before

    def _score_all(self, hidden: Tensor) -> Tensor:
        """What the head does while it scores: losses (B, T, 1) in place of logits (B, T, V)."""
        assert self._targets is not None
        hidden = hidden[:, -self._targets.shape[1] :]
        size = max(1, LOGITS_AT_ONCE // (self.head.weight.shape[0] * len(hidden)))
        losses, hits = [], []
        for part, wanted in zip(hidden.split(size, 1), self._targets.split(size, 1), strict=True):
            if torch.is_grad_enabled():
                # The logits of a part are made again in the backward pass, not kept.
                loss, hit = checkpoint(self._score, part, wanted, use_reentrant=False)
            else:
                loss, hit = self._score(part, wanted)
            losses.append(loss)
            hits.append(hit)
        self._hits = torch.cat(hits, dim=1)
        return torch.cat(losses, dim=1)[..., None]

    def _finish(self, logits: Tensor) -> Tensor:
        """What the model does to the logits of its head."""
        logits = logits.float()
        if self.factor != 1:  # multiplying by 1 would cost a copy of all logits
            logits = logits * self.factor
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._finish(self._logits_of(hidden))
        loss = cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=UNSCORED
        )
        asked = slice(0 if torch.is_grad_enabled() else None)
        return loss.view(targets.shape), logits.detach()[:, asked].argmax(-1) == targets[:, asked]

    @torch.no_grad()
    def check(self, input_ids: Tensor) -> None:
        """Compare our logits of one token of each row with the model's own, the first time.

        Raises:
            UnsupportedModelError: they differ.
        """
        if self._checked:
            return
        caught: list[Tensor] = []
        handle = self.head.register_forward_hook(
            lambda _module, _args, output: caught.append(output)
        )
        try:
            # The model without its wrapping, which may compile a pass of this size for nothing.
            output = self.plain(input_ids=input_ids[:, :8], logits_to_keep=1, use_cache=False)
        finally:
            handle.remove()
        ours, theirs = self._finish(caught[-1][:, -1:]), output.logits[:, -1:].float()
        exact = caught[-1].dtype == torch.float32
        tolerance = 1e-4 if exact else 0.05
        if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * theirs.std().item()):
            raise UnsupportedModelError(
                f"{type(self.plain).__name__} does more to its logits than apply its head"
            )
        self._checked = True
