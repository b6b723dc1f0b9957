"""A model as lm-evaluation-harness calls it: every request at the scale of its own length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor, nn

from ..errors import ConfigError
from ..hf.extend import at_scale, extension_of, scale_for
from ..hf.loss import TokenLoss

# Rows of a batch, however short they are.
_MOST_ROWS = 64


@dataclass(frozen=True)
class Read:
    """What the model was given of one request.

    Attributes:
        tokens: of the request, before anything was cut off.
        read: tokens that the model read.
        scale: length scale t that it read them at.
    """

    tokens: int
    read: int
    scale: float


@dataclass(frozen=True)
class _Prompt:
    """A generation request, tokenised and cut: where its answer belongs, and how to make it."""

    index: int
    text: str
    tokens: int
    ids: list[int]
    settings: dict[str, Any]


def cut_middle(ids: list[int], limit: int) -> list[int]:
    """The first and the last half of `limit` tokens of a longer prompt, as LongBench cuts it.

    The authors join the two halves as text and tokenise it again; here the tokens are joined, so
    that the result is never longer than `limit`.
    """
    if len(ids) <= limit:
        return ids
    half = limit // 2
    return ids[:half] + ids[len(ids) - half :]


class HarnessModel(HFLM):
    """lm-eval's model of transformers with the length rule of clex.

    A batch holds requests of several lengths; each row keeps the scale that it would have alone:
    for a likelihood that of the tokens that are read, for a generation that of the prompt and all
    tokens that may be generated. A plain model has no scale.

    Args:
        model: a plain or extended causal model.
        tokenizer: its tokenizer.
        max_length: most tokens of a request; longer ones are cut.
        batch_tokens: most tokens of a batch, padding included; at least one request is read.
        progress: called with the requests done and the requests of this call.

    Attributes:
        middle: whether long prompts of generations lose their middle (LongBench) or their start
            (lm-eval's own rule).
        reads: by the strings of a request, what the model was given of it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_length: int,
        batch_tokens: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=_MOST_ROWS,
        )
        self.batch_tokens = batch_tokens
        self.progress = progress
        self.middle = False
        self.reads: dict[tuple[str, ...], Read] = {}
        self._extended = extension_of(model) is not None
        self._losses_of = TokenLoss(getattr(model, "get_base_model", lambda: model)())

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """lm-eval's own, without its bars."""
        result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return result

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """lm-eval's own, without its bars: long texts are read in windows of `max_length`."""
        result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        for (text,) in (request.args for request in requests):
            read = min(len(self.tok_encode(text)), self.max_length)
            self.reads[(text,)] = Read(read, read, self._scales([read])[0])
        return result

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of log-likelihoods of each continuation, and whether it is the greedy one."""
        # The last token is scored but not read.
        texts = [(context + end)[-(self.max_length + 1) :] for _, context, end in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def score(batch: list[int]) -> None:
            # Padding on the right is not seen by the tokens before it, and moves no position.
            size = max(len(texts[i]) for i in batch)
            ids = torch.tensor([texts[i] + [0] * (size - len(texts[i])) for i in batch])
            starts = [len(texts[i]) - len(requests[i][2]) for i in batch]
            scales = self._scales([len(texts[i]) - 1 for i in batch])
            with self._held(scales):
                loss, hit = self._losses_of(
                    self.model, ids.to(self.device), last=size - min(starts)
                )
            for row, (i, start) in enumerate(zip(batch, starts, strict=True)):
                scored = slice(start - min(starts), len(texts[i]) - min(starts))
                answers[i] = (
                    -loss[row, scored].double().sum().item(),
                    bool(hit[row, scored].all()),
                )
                request, context, end = requests[i]
                if request is not None:
                    self.reads[request] = Read(
                        len(context) + len(end) - 1, len(texts[i]) - 1, scales[row]
                    )

        self._in_batches([len(text) - 1 for text in texts], score)
        return answers

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text for each request, ended before its first stop sequence."""
        prompts = [self._prompt(i, *request.args) for i, request in enumerate(requests)]
        groups: dict[str, list[_Prompt]] = {}
        for prompt in prompts:
            key = json.dumps(prompt.settings, sort_keys=True, default=str)
            groups.setdefault(key, []).append(prompt)
        texts, done = [""] * len(requests), 0
        for group in groups.values():
            new = int(group[0].settings["max_gen_toks"])

            def answer(batch: list[int], group: list[_Prompt] = group, new: int = new) -> None:
                rows = [group[i] for i in batch]
                for prompt, text in zip(rows, self._generate(rows, new), strict=True):
                    texts[prompt.index] = text

            lengths = [len(prompt.ids) + new for prompt in group]
            done = self._in_batches(lengths, answer, done, len(requests))
        return texts

    def _prompt(self, index: int, text: str, settings: dict[str, Any]) -> _Prompt:
        settings = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        limit = self.max_length - int(settings["max_gen_toks"])
        if limit < 2:
            raise ConfigError(
                f"a window of {self.max_length} tokens has no room for a prompt and"
                f" {settings['max_gen_toks']} new tokens; pass a larger --max-length"
            )
        ids = self.tok_encode(text)
        kept = cut_middle(ids, limit) if self.middle else ids[-limit:]
        return _Prompt(index, text, len(ids), kept, settings)

    def _generate(self, rows: Sequence[_Prompt], new: int) -> list[str]:
        settings = dict(rows[0].settings)
        del settings["max_gen_toks"]
        if not settings.get("do_sample"):
            settings.pop("temperature", None)
        end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, False)
        until = handle_stop_sequences(list(settings.pop("until", [])), end)
        size = max(len(row.ids) for row in rows)
        # Where no token ends a text, lm-eval invents a token for padding that has no embedding.
        pad = 0 if self.eot_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (size - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (size - len(row.ids)) + [1] * len(row.ids) for row in rows])
        scales = self._scales([len(row.ids) + new for row in rows])
        with self._held(scales):
            output: Tensor = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=new,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, until, size, len(rows)),
                pad_token_id=pad,
                use_cache=True,
                **settings,
            )
        for row, scale in zip(rows, scales, strict=True):
            self.reads[(row.text,)] = Read(row.tokens, len(row.ids), scale)
        texts = [self.tok_decode(tokens) for tokens in output[:, size:].tolist()]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _scales(self, lengths: Sequence[int]) -> list[float]:
        if not self._extended:
            return [1.0] * len(lengths)
        return [scale_for(self.model, length) for length in lengths]

    def _held(self, scales: list[float]) -> AbstractContextManager[None]:
        return at_scale(self.model, scales) if self._extended else nullcontext()

    def _in_batches(
        self,
        lengths: Sequence[int],
        work: Callable[[list[int]], None],
        done: int = 0,
        total: int | None = None,
    ) -> int:
        """Call `work` for all requests, longest first, in batches that fit `batch_tokens`.

        Where a batch does not fit into the memory of the GPU, batches are half as large from then
        on.

        Args:
            lengths: of the requests, tokens.
            work: called with the numbers of the requests of a batch.
            done: requests of this call that were done before.
            total: all requests of this call; these ones if not given.

        Returns:
            `done` and these.

        Raises:
            ConfigError: a single request does not fit.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            longest = max(1, lengths[order[0]])
            batch = order[: max(1, min(_MOST_ROWS, self.batch_tokens // longest))]
            try:
                work(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise ConfigError(
                        f"a request of {longest:,} tokens does not fit into the memory of"
                        f" {self.device}; pass a smaller --max-length"
                    ) from None
                self.batch_tokens = len(batch) * longest // 2
                torch.cuda.empty_cache()
                continue
            order = order[len(batch) :]
            done += len(batch)
            self.progress(done, total or len(lengths))
        return done
