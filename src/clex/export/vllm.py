"""vLLM inside this process, as the engine that tries exports for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..serving.length_classes import FIRST_RUNNER, PROCESSOR, REQUEST_KEY
from .record import ExportRecord
from .scores import Scores

# What vLLM reads from the environment when it is imported; what the user has set stays.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VllmEngine:
    """An export loaded by vLLM in float32, without compilation.

    Two scales are tried at the long one: the length of the export is longer than the native window.

    Args:
        folder: written for target ``vllm`` or ``hf``.
        record: what it is.
        longest: of the prompts, in tokens.

    Raises:
        UnsupportedModelError: vLLM cannot load it.
    """

    def __init__(self, folder: Path, record: ExportRecord, longest: int) -> None:
        settings = dict(_SETTINGS)
        if record.scales:
            settings.update([FIRST_RUNNER])
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        import vllm

        processors: dict[str, Any] = {}
        if record.scales:
            processors = {"logits_processors": [PROCESSOR]}
        # vLLM sets the threads of the whole process.
        threads = torch.get_num_threads()
        try:
            self._llm = vllm.LLM(
                str(folder),
                dtype="float32",
                # Several scales are asked for by name; a shorter window needs fewer keys.
                max_model_len=longest + 1 if record.scales else record.length,
                # Tokens go in and numbers come out: a model without a tokenizer is served as well.
                skip_tokenizer_init=True,
                # A prompt whose keys are cached already would have no log-probabilities.
                enable_prefix_caching=False,
                enforce_eager=True,
                max_num_batched_tokens=max(longest, 2048),
                max_num_seqs=2,
                disable_log_stats=True,
                **processors,
            )
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModelError(f"vLLM cannot load the export: {error}") from error
        finally:
            torch.set_num_threads(threads)
        self._several = bool(record.scales)

    def scores(self, ids: list[int], count: int, scale: float) -> Scores:
        """Rate the last `count` tokens of `ids`, at `scale` where the export has several."""
        import vllm

        wish = {REQUEST_KEY: scale} if self._several else None
        rate = vllm.SamplingParams(
            max_tokens=1, prompt_logprobs=1, detokenize=False, extra_args=wish
        )
        # A prompt is rated and one token made: the text must be below max_model_len.
        answer = self._llm.generate([{"prompt_token_ids": ids}], rate, use_tqdm=False)[0]
        rows = answer.prompt_logprobs[-count:]
        wanted = [row[token].logprob for row, token in zip(rows, ids[-count:], strict=True)]
        best = [max((entry.logprob, token) for token, entry in row.items())[1] for row in rows]
        return Scores(torch.tensor(wanted, dtype=torch.float64), torch.tensor(best))
