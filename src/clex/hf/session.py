"""A text of unknown final length: a conversation, or one long answer.

The scale t must not change while a cache lives, and the length that decides on t is not known in a
conversation. A session keeps tokens, cache and t together, and does what was chosen when the text
grows over a border of the grid of t.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from ..errors import ConfigError, DataError, unknown
from .cache import KeyLayout, key_layouts, move_cache
from .extend import at_scale, config_of, extension_of, scale_for

ON_GROWTH = ("refill", "rerotate", "hold")

# What a session decides itself, or cannot follow: it is one row, and its cache is its own.
_NOT_OPTIONS = (
    "attention_mask",
    "cache_implementation",
    "input_ids",
    "inputs_embeds",
    "max_length",
    "num_beams",
    "num_return_sequences",
    "past_key_values",
    "stop_strings",
    "streamer",
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `Session.generate` made.

    Attributes:
        ids: new tokens, the end token included where there was one.
        finish: ``"stop"`` (end token or a stopping criterion), ``"length"`` (`max_new_tokens`) or
            ``"window"``: the longest text that the model reads was reached.
    """

    ids: list[int]
    finish: Literal["stop", "length", "window"]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One change of scale: from, to, and the length of the text that asked for it."""

    t_from: float
    t_to: float
    length: int


class Session:
    """One growing text, its cache and its scale.

    t is that of the text's length on the grid of the extension, so it changes at a few lengths only
    (an extension with grid ``"none"`` is moved a quarter of an octave at a time).

    Args:
        model: an extended model; a plain one has t = 1 and its own window.
        on_growth: what happens to the cache when t changes. ``"refill"``: the whole text is read
            again at the new t; exact. ``"rerotate"``: cached keys are turned, see
            `clex.hf.cache.move_cache`; takes milliseconds, approximate. ``"hold"``: t stays what
            it was at the first prefill, with one warning when the text is longer than that.
        scale: a t to hold from the start.
        chunk: tokens of a prefill that go through the model at a time; bounds its memory.

    Attributes:
        ids: the tokens of the text.
        scale: t in force; ``None`` before the first prefill.
        limit: tokens of the longest text, native length times max_scale.
        native_length: tokens that the model was trained to read.
        moves: changes of scale so far.

    Raises:
        ConfigError: an argument is out of range, or a plain model does not say its window.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_growth: str = "refill",
        scale: float | None = None,
        chunk: int = 2048,
    ) -> None:
        if on_growth not in ON_GROWTH:
            raise ConfigError(unknown("on_growth", on_growth, ON_GROWTH))
        if chunk < 1:
            raise ConfigError(f"chunk must be at least 1, not {chunk}")
        self.model: Any = model
        self.on_growth = on_growth if scale is None else "hold"
        self.chunk = chunk
        self.native_length, self.max_scale = _window(model)
        self.limit = int(self.native_length * self.max_scale + 1e-6)
        if scale is not None and not 1 <= scale <= self.max_scale:
            raise ConfigError(f"scale {scale:g} is out of range (valid: 1 to {self.max_scale:g})")
        self._given_scale = scale
        self._layouts: list[KeyLayout | None] | None = None
        self._cached = 0
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.ids: list[int] = []
        self.scale = self._given_scale
        self.moves: list[Move] = []
        self._warned = False
        self._drop_cache()

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens to the text; they are read by the next `prefill` or `generate`.

        Raises:
            DataError: the text would be longer than `limit`; it is unchanged then.
        """
        self._require_fits(len(self.ids) + len(ids))
        self.ids.extend(ids)

    def rewrite(self, ids: Sequence[int]) -> None:
        """Make the text be `ids`, keeping the cache for as many tokens as agree from the start.

        For chat templates, which may write earlier turns anew. The scale stays while any of the
        cache does.

        Raises:
            DataError: the text would be longer than `limit`; it is unchanged then.
        """
        self._require_fits(len(ids))
        same = next(
            (i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b),
            min(len(self.ids), len(ids)),
        )
        self.ids = list(ids)
        if same < self._cached:
            # Sliding and recurrent layers have forgotten what a shorter text would need.
            if same and all(type(layer) is DynamicLayer for layer in self.cache.layers):
                self.cache.crop(same - self._cached)
                self._cached = same
            else:
                self._drop_cache()
                self.scale = self._given_scale

    def prefill(self, advance: Callable[[int], None] | None = None) -> None:
        """Read what was not read yet, all but the last token, at the scale of the whole text.

        Args:
            advance: called with the number of tokens after each chunk, for a progress bar.
        """
        if not self.ids:
            raise DataError("the text is empty: there is nothing to go on from")
        self._grow(len(self.ids))
        rest = torch.tensor([self.ids[self._cached : -1]], device=self._device)
        with self._guarded(), self._held():
            prefill(self.model, rest, self.cache, chunk=self.chunk, advance=advance)
        self._cached = len(self.ids) - 1

    def generate(
        self,
        max_new_tokens: int,
        *,
        on_token: Callable[[int], None] | None = None,
        advance: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Answer:
        """Go on with the text, over borders of the grid where it comes to them.

        An exception on the way, Ctrl-C among them, leaves the tokens that were made so far in the
        text.

        Args:
            max_new_tokens: most tokens of the answer.
            on_token: called with each new token as it comes.
            advance: see `prefill`.
            options: for the `generate` of transformers: `do_sample`, `temperature`, `top_p` ...

        Returns:
            The new tokens, which are part of the text now.

        Raises:
            DataError: the text is empty, or already as long as the model reads.
            ConfigError: an option that a session decides itself.
        """
        for name in options:
            if name in _NOT_OPTIONS:
                raise ConfigError(f"{name} is not an option of a session")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self._require_fits(len(self.ids) + 1)
        ends = self._end_tokens(options)
        start = len(self.ids)
        while True:
            self.prefill(advance)
            made = len(self.ids) - start
            # The last new token of a call is not read by it, so it may stand behind the border.
            wanted = min(
                max_new_tokens - made,
                self._border(len(self.ids)) + 1 - len(self.ids),
                self.limit - len(self.ids),
            )
            before = len(self.ids)
            self._generate(wanted, on_token, options, made)
            new = self.ids[start:]
            if len(self.ids) - before < wanted or new[-1] in ends:
                return Answer(ids=new, finish="stop")
            if len(new) == max_new_tokens:
                return Answer(ids=new, finish="length")
            if len(self.ids) == self.limit:
                return Answer(ids=new, finish="window")

    def _generate(
        self,
        wanted: int,
        on_token: Callable[[int], None] | None,
        options: dict[str, Any],
        made: int,
    ) -> None:
        """At most `wanted` tokens at the scale in force, added to the text as they come."""
        options = dict(options)
        if options.get("min_new_tokens"):
            options["min_new_tokens"] = min(wanted, max(0, options["min_new_tokens"] - made))
        ids = torch.tensor([self.ids], device=self._device)

        def keep(token: int) -> None:
            self.ids.append(token)
            if on_token is not None:
                on_token(token)

        with self._guarded(), self._held():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                max_new_tokens=wanted,
                streamer=_Tap(keep),
                **options,
            )
        self._cached = len(self.ids) - 1

    def _grow(self, length: int) -> None:
        """Make the scale fit a text of `length` tokens."""
        t = self._scale_for(length)
        if self.scale is None:
            self.scale = t
        elif t > self.scale and self.on_growth == "hold":
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the text has {length} tokens, and the scale is held at {self.scale:g},"
                    f" which is for {int(self.scale * self.native_length)}",
                    stacklevel=4,
                )
        elif t > self.scale and not self._cached:
            self.scale = t
        elif t > self.scale:
            if self.on_growth == "rerotate":
                self._layouts = self._layouts or key_layouts(self.model)
                with self._guarded():
                    move_cache(self.model, self.cache, self.scale, t, layouts=self._layouts)
            else:
                self._drop_cache()
            self.moves.append(Move(t_from=self.scale, t_to=t, length=length))
            self.scale = t

    def _scale_for(self, length: int) -> float:
        if extension_of(self.model) is None:
            return 1.0
        if config_of(self.model).grid == "none" and length > self.native_length:
            steps = math.ceil(4 * math.log2(length / self.native_length) - 1e-9)
            length = min(self.limit, int(self.native_length * 2 ** (steps / 4)))
        return scale_for(self.model, length)

    def _border(self, length: int) -> int:
        """The longest text that has the scale of one with `length` tokens."""
        t = max(self._scale_for(length), self.scale or 1.0)
        low, high = length, self.limit  # scales never fall with the length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._scale_for(middle) <= t else (low, middle - 1)
        return low

    def _require_fits(self, length: int) -> None:
        if length > self.limit:
            raise DataError(
                f"the text has {length} tokens and the window is {self.limit}"
                f" (native {self.native_length} x max_scale {self.max_scale:g})"
            )

    def _end_tokens(self, options: dict[str, Any]) -> set[int]:
        config = options.get("generation_config") or self.model.generation_config
        ends = options.get("eos_token_id", config.eos_token_id)
        return {ends} if isinstance(ends, int) else set(ends or ())

    def _held(self) -> AbstractContextManager[None]:
        if extension_of(self.model) is None:
            return nullcontext()
        assert self.scale is not None
        return at_scale(self.model, self.scale)

    def _drop_cache(self) -> None:
        self.cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self._cached = 0

    def _guarded(self) -> _Guard:
        return _Guard(self)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


class _Guard:
    """Drops the cache when its block ends early: layers may hold different numbers of tokens."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.session._drop_cache()


class _Tap(BaseStreamer):
    """Passes new tokens on; transformers gives a streamer the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_passed = False

    def put(self, value: Tensor) -> None:
        if self.prompt_passed:
            for token in value.reshape(-1).tolist():
                self.on_token(token)
        self.prompt_passed = True

    def end(self) -> None:
        pass


@torch.no_grad()
def prefill(
    model: nn.Module,
    ids: Tensor,
    cache: Any,
    *,
    chunk: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Read tokens into a cache without computing logits, in the scale that the caller holds.

    Args:
        model: a causal language model, in evaluation mode.
        ids: (B, T) tokens that follow what is in the cache; may be empty.
        cache: a cache of transformers.
        chunk: tokens that go through the model at a time.
        advance: called with the number of tokens after each chunk.
    """
    host: Any = model
    decoder = host.get_decoder()
    for part in ids.split(chunk, dim=1):
        if part.shape[1]:
            decoder(input_ids=part, past_key_values=cache, use_cache=True)
            if advance is not None:
                advance(part.shape[1])


def _window(model: nn.Module) -> tuple[int, float]:
    """Native length and largest scale of a model, plain or extended."""
    if extension_of(model) is not None:
        config = config_of(model)
        assert config.native_length is not None
        return config.native_length, config.max_scale
    host: Any = model
    native = getattr(host.config.get_text_config(), "max_position_embeddings", None)
    if not native:
        raise ConfigError(f"{type(model).__name__} does not say how long a text it reads")
    return int(native), 1.0
