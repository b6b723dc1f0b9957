"""Engines that an export can be tried in, behind one question: how likely are these tokens?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..hf.models import load_base
from .record import GGUF_FILE, ExportRecord
from .scores import Scores
from .vllm import VllmEngine


class Engine(Protocol):
    """A serving engine with one export loaded."""

    def scores(self, ids: list[int], count: int, scale: float) -> Scores:
        """Rate the last `count` tokens of `ids`, each given all that come before it.

        Args:
            ids: the text.
            count: fewer than its tokens.
            scale: t to read it at; an export of one scale has no other.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an engine may be from the live model on log-probabilities, in nats.

    Attributes:
        most: largest difference, or ``None`` where single tokens may differ by more.
        mean: mean difference.
    """

    most: float | None
    mean: float


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """An engine that may be installed.

    Attributes:
        package: module whose presence says that it is.
        install: command that installs it.
        exact: tolerance for float32 weights.
        open: loads an export whose longest prompt will have so many tokens.
    """

    package: str
    install: str
    exact: Tolerance
    open: Callable[[Path, ExportRecord, int], Engine]


def live_log_probs(model: nn.Module, ids: list[int], count: int) -> Tensor:
    """Log-probabilities (count, vocabulary), float64, for the last `count` tokens of `ids`."""
    runner: Any = model
    with torch.no_grad():
        out = runner(
            input_ids=torch.tensor([ids[:-1]]), use_cache=False, logits_to_keep=count
        ).logits[0, -count:]
    return out.double().log_softmax(-1)


def scores_of(log_probs: Tensor, ids: list[int]) -> Scores:
    """Scores from whole distributions (count, vocabulary)."""
    wanted = torch.tensor(ids[-len(log_probs) :])
    return Scores(log_probs.gather(1, wanted[:, None])[:, 0], log_probs.argmax(-1))


class _Transformers:
    def __init__(self, folder: Path, record: ExportRecord, longest: int) -> None:
        if record.form == "two_scales":
            raise UnsupportedModelError(
                "transformers changes over between two scales while keys are cached"
            )
        if record.scales:
            raise UnsupportedModelError("transformers reads an export at its longest scale only")
        self.model = load_base(folder, dtype=torch.float32)

    def scores(self, ids: list[int], count: int, scale: float) -> Scores:
        return scores_of(live_log_probs(self.model, ids, count), ids)


class _LlamaCpp:
    """llama.cpp's server inside this process (the wheel `xllamacpp`).

    It tells the distribution after the last token only, so each of the wanted tokens is one
    request, of which all but one token is in its cache already.
    """

    def __init__(self, folder: Path, record: ExportRecord, longest: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(folder / GGUF_FILE)
        params.n_ctx = longest + 1
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = 0
        threads = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        # What is compared are the numbers of the file, not the rounding of a half-width cache.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise UnsupportedModelError(f"llama.cpp cannot load the export: {error}") from error

    def scores(self, ids: list[int], count: int, scale: float) -> Scores:
        rows = [self._next(ids[:end]) for end in range(len(ids) - count, len(ids))]
        return scores_of(torch.stack(rows), ids)

    def _next(self, ids: list[int]) -> Tensor:
        """Log-probabilities of the token after `ids`, float64, shape (vocabulary,)."""
        answer = self.server.handle_completions(
            {
                "prompt": ids,
                "n_predict": 1,
                "n_probs": 1 << 20,
                "temperature": 0.0,
                "cache_prompt": True,
                # It tells nothing where the next token is half a letter or the end, so that is
                # set; the probabilities that it tells are those from before.
                "logit_bias": [["a", 1000.0]],
            }
        )
        if "choices" not in answer:
            raise UnsupportedModelError(f"llama.cpp refused a prompt of {len(ids)}: {answer}")
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        log_probs = torch.full((len(top),), -torch.inf, dtype=torch.float64)
        for entry in top:
            log_probs[entry["id"]] = entry["logprob"]
        # Its float32 sum over the vocabulary is off by 5e-5.
        return log_probs.log_softmax(-1)


# By target. A further engine is an entry here.
ENGINES: dict[str, EngineKind] = {
    "hf": EngineKind(
        package="transformers",
        install="pip install transformers",
        exact=Tolerance(most=5e-4, mean=5e-5),
        open=_Transformers,
    ),
    "gguf": EngineKind(
        package="xllamacpp",
        install="pip install xllamacpp",
        exact=Tolerance(most=5e-3, mean=5e-4),
        open=_LlamaCpp,
    ),
    "vllm": EngineKind(
        package="vllm",
        install="run clex where vLLM is installed (docs/serving.md says how)",
        exact=Tolerance(most=1e-3, mean=1e-4),
        open=VllmEngine,
    ),
}


def engine_for(target: str) -> EngineKind:
    """The engine that tries exports for `target`.

    Raises:
        ConfigError: there is none, or it is not installed.
    """
    if target not in ENGINES:
        raise ConfigError(f"no engine is here that tries target {target!r}")
    kind = ENGINES[target]
    if importlib.util.find_spec(kind.package) is None:
        raise ConfigError(f"--verify needs {kind.package}: {kind.install}")
    return kind
