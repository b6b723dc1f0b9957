"""The length classes of a server: a few scales, and which of them each request gets.

Plain numbers, without any engine: an export holds them in its config.json, a plugin reads them
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import ConfigError

# Key in config.json, and the request's own wish beside its sampling parameters.
CONFIG_KEY = "clex_scales"
REQUEST_KEY = "clex_scale"

# Before the name of the plain architecture: a vLLM without the plugin must refuse the folder.
PREFIX = "Clex"
# Plain architectures that the plugin serves, as transformers and vLLM call them.
ARCHITECTURES = (
    "Gemma2ForCausalLM",
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

# What a server is started with: a logits processor by name, and the runner that knows such ones.
PROCESSOR = "clex.serving.vllm_requests:RequestScales"
FIRST_RUNNER = ("VLLM_USE_V2_MODEL_RUNNER", "0")


@dataclass(frozen=True, kw_only=True)
class LengthClasses:
    """Frequencies and temperature of several scales, shortest first.

    Attributes:
        native_length: window of the plain model in tokens.
        scales: t of each class, rising.
        inv_freq: of each class, rotary_dim / 2 numbers, radians per token.
        attention_factors: on cos and sin, one for each class.
    """

    native_length: int
    scales: tuple[float, ...]
    inv_freq: tuple[tuple[float, ...], ...]
    attention_factors: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LengthClasses:
        """What `to_dict` wrote, after its way through JSON.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            found = cls(
                native_length=int(values["native_length"]),
                scales=tuple(map(float, values["scales"])),
                inv_freq=tuple(tuple(map(float, row)) for row in values["inv_freq"]),
                attention_factors=tuple(map(float, values["attention_factors"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{CONFIG_KEY} in config.json is damaged: {error!r}") from None
        if not len(found.scales) == len(found.inv_freq) == len(found.attention_factors) > 0:
            raise ConfigError(f"{CONFIG_KEY} in config.json is damaged: its lists differ in length")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Longest text of each class in tokens."""
        return tuple(length_at(self.native_length, t) for t in self.scales)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the rows of each class begin in `cos_sin`."""
        return tuple(sum(self.lengths[:i]) for i in range(len(self.scales)))

    @property
    def rotary_dim(self) -> int:
        """Rotated entries of a head."""
        return 2 * len(self.inv_freq[0])

    def choose(self, prompt: int | None, new: int | None, wanted: object = None) -> int:
        """The class of a request: the shortest that holds its prompt and its answer.

        It is final, since keys are cached after rotation.

        Args:
            prompt: tokens; ``None`` where nobody knows them, which takes the longest class.
            new: tokens of the answer at most; ``None`` for no limit.
            wanted: a scale that the request asks for. It is rounded up to a class, and a class that
                is too short for the request is never taken. What is no scale is passed over here;
                `require_scale` refuses it where an answer can still say so.

        Returns:
            Index into `scales`.
        """
        last = len(self.scales) - 1
        if prompt is None or new is None:
            return last
        needed = next((i for i, n in enumerate(self.lengths) if n >= prompt + new), last)
        if not is_scale(wanted):
            return needed
        asked = next((i for i, t in enumerate(self.scales) if t >= wanted - 1e-6), last)
        return max(needed, asked)

    def cos_sin(self) -> Tensor:
        """cos and sin side by side for every position of every class, one class after the other.

        Returns:
            float32, shape (sum of `lengths`, rotary_dim), the attention factors multiplied in.
        """
        tables = []
        for length, inv_freq, factor in zip(
            self.lengths, self.inv_freq, self.attention_factors, strict=True
        ):
            positions = torch.arange(length, dtype=torch.float32)
            angles = torch.outer(positions, torch.tensor(inv_freq, dtype=torch.float32))
            tables.append(torch.cat((angles.cos(), angles.sin()), dim=-1) * factor)
        return torch.cat(tables)


def length_at(native_length: int, t: float) -> int:
    """Longest text in tokens at scale `t`."""
    return math.floor(native_length * t + 1e-6)


def is_scale(value: object) -> TypeGuard[float]:
    """Whether a request's wish is a number that can be a scale."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= 1


def require_scale(value: object) -> None:
    """Check a request's wish.

    Raises:
        ConfigError: it is no number of at least 1.
    """
    if not is_scale(value):
        raise ConfigError(f"{REQUEST_KEY} must be a number of at least 1, not {value!r}")


def shift_positions(
    positions: Tensor, starts: Tensor, offsets: Tensor, rows: int, out: Tensor
) -> Tensor:
    """Positions of the tokens of a batch as row numbers of `LengthClasses.cos_sin`.

    Nothing here depends on values, so that it may run inside a CUDA graph.

    Args:
        positions: (N,), each within its own text; padding at the end may hold anything.
        starts: (B + 1,), the first token of each request, and the end.
        offsets: (B or more,), where the class of each request begins.
        rows: of the table. Padding is kept inside it.
        out: (N,) int64, written and returned: compiled models want the same memory each time.
    """
    tokens = torch.arange(len(positions), device=positions.device, dtype=starts.dtype)
    request = torch.searchsorted(starts[1:], tokens, right=True)
    request = request.clamp(max=len(offsets) - 1)
    return torch.clamp(positions + offsets[request], max=rows - 1, out=out)
