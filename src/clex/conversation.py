"""What `clex generate` and `clex chat` do: texts and turns in, streamed text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TextStreamer

from .config import ClexConfig
from .errors import ConfigError, DataError, unknown
from .files import write_json
from .hf.checkpoint import base_name, is_checkpoint, load
from .hf.extend import extend
from .hf.models import load_base, load_tokenizer
from .hf.session import Answer, Session
from .run import choose_device

TRUNCATIONS = ("start", "middle", "end")


def load_for_text(
    name: str, *, method: str | None = None, max_scale: float | None = None, device: str = "auto"
) -> tuple[nn.Module, Any]:
    """A model, plain or extended, and its tokenizer.

    Args:
        name: a plain model, or a result of `clex extend`.
        method: a training-free method for a plain model; it stays plain where none is given.
        max_scale: longest scale of that method; 8 if not given.
        device: ``auto``, ``cpu``, ``cuda`` ...

    Raises:
        ConfigError: a method for a model that is extended already, or a scale without a method.
    """
    place = choose_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    if is_checkpoint(name):
        if method is not None or max_scale is not None:
            raise ConfigError(
                f"{name} is extended already: --method and --max-scale are not for it"
            )
        return load(name, dtype=dtype, device=place), load_tokenizer(base_name(name))
    if method is None and max_scale is not None:
        raise ConfigError("--max-scale needs a --method, such as yarn")
    tokenizer = load_tokenizer(name)
    model = load_base(name, dtype=dtype, device=place)
    if method is not None:
        extend(model, ClexConfig(method=method, max_scale=8.0 if max_scale is None else max_scale))
    return model, tokenizer


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Tokens of `text`, with the tokenizer's start token where it has one and `special` is set."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def encode_messages(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Tokens of a conversation, up to where the answer begins.

    Raises:
        ConfigError: the model has no chat template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this model has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"the chat template of this model: {error}") from error
    return encode(tokenizer, text, special=False)


def fit(ids: Sequence[int], most: int, truncate: str | None, window: str) -> list[int]:
    """`ids` if they are at most `most`; else cut, where the caller wants that.

    Args:
        ids: tokens of a prompt.
        most: the window less the new tokens.
        truncate: what is cut away: ``"start"``, ``"middle"``, ``"end"``; ``None``: nothing.
        window: describes the window in the error.

    Raises:
        DataError: too long, and nothing may be cut; or no room for a prompt at all.
        ConfigError: an unknown `truncate`.
    """
    if truncate is not None and truncate not in TRUNCATIONS:
        raise ConfigError(unknown("--truncate", truncate, TRUNCATIONS))
    if most < 1:
        raise DataError(f"no room for a prompt: {window}")
    if len(ids) <= most:
        return list(ids)
    if truncate is None:
        raise DataError(
            f"the prompt has {len(ids):,} tokens and {most:,} fit: {window}; --truncate start,"
            " middle or end cuts it"
        )
    head = {"start": 0, "middle": most // 2, "end": most}[truncate]
    tail = most - head
    return [*ids[:head], *ids[len(ids) - tail :]]


def describe_window(session: Session) -> str:
    """The window of a session in words, such as ``window 65,536 (native 8,192 x 8)``."""
    native, scale = session.native_length, session.limit / session.native_length
    return f"window {session.limit:,} (native {native:,} x {scale:g})"


def describe(session: Session) -> str:
    """Window, scale and use of a session in one line."""
    used = len(session.ids)
    scale = "-" if session.scale is None else f"{session.scale:.3g}"
    return f"{describe_window(session)}, t {scale}, {used:,} tokens used"


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    config = model.generation_config.eos_token_id
    ends = [config] if isinstance(config, int) else list(config or ())
    ends.append(tokenizer.eos_token_id)
    return [end for end in dict.fromkeys(ends) if end is not None]


class TextWriter(TextStreamer):
    """Turns tokens into text as they come, a word at a time, and passes it on."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write = write

    def token(self, token: int) -> None:
        """Take the next token."""
        self.put(torch.tensor([token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class Conversation:
    """Turns between a user and a model, in one session.

    Args:
        session: an empty one.
        tokenizer: of the model.
        system: what the model is told first; needs a chat template.
        plain: add turns to the text as they are, without a chat template.
        forget: drop the oldest turns when the window is full; it is an error otherwise.

    Attributes:
        messages: what was said, as chat templates take it.

    Raises:
        ConfigError: the model has no chat template and `plain` is not set.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        system: str | None = None,
        plain: bool = False,
        forget: bool = False,
    ) -> None:
        if not plain and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "this model has no chat template: it was not made for turns; --plain lets it go on"
                " with your text as it is"
            )
        if plain and (system is not None or forget):
            raise ConfigError("--system and --forget need a chat template, not --plain")
        self.session, self.tokenizer = session, tokenizer
        self.system, self.plain, self.forget = system, plain, forget
        self.reset()

    def reset(self) -> None:
        """Start anew, with the same system message."""
        self.session.reset()
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def save(self, path: Path) -> None:
        """Write the messages as JSON."""
        write_json(path, self.messages)

    def say(
        self,
        text: str,
        max_new_tokens: int,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """A turn of the user: the model reads it.

        Args:
            text: the turn.
            max_new_tokens: room that `forget` keeps for the answer.
            advance: see `Session.prefill`.

        Raises:
            DataError: the window is full. This or an interruption forgets the turn.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            self._rewrite(text, max_new_tokens)
            self.session.prefill(advance)
        except BaseException:
            self.messages = before
            raise

    def answer(
        self, max_new_tokens: int, *, write: Callable[[str], None], **options: Any
    ) -> Answer:
        """The model's turn. What it said before an interruption stays in the conversation.

        Args:
            max_new_tokens: most tokens of the answer.
            write: called with pieces of its text as they come.
            options: see `Session.generate`.
        """
        start = len(self.session.ids)
        writer = TextWriter(self.tokenizer, write)
        try:
            return self.session.generate(max_new_tokens, on_token=writer.token, **options)
        finally:
            writer.end()
            said = self.tokenizer.decode(self.session.ids[start:], skip_special_tokens=True)
            self.messages.append({"role": "assistant", "content": said})

    def _rewrite(self, text: str, max_new_tokens: int) -> None:
        """Make the session's text that of the messages, with room for one token at least."""
        session = self.session
        if self.plain:
            ids = [*session.ids, *encode(self.tokenizer, text, special=not session.ids)]
        else:
            ids = encode_messages(self.tokenizer, self.messages)
            first = 1 if self.system is not None else 0
            while self.forget and len(ids) + max_new_tokens > session.limit:
                if len(self.messages) - first < 3:
                    break
                del self.messages[first : first + 2]
                ids = encode_messages(self.tokenizer, self.messages)
        if len(ids) >= session.limit:
            raise DataError(
                f"with this turn the text has {len(ids):,} tokens: {describe_window(session)}"
            )
        session.rewrite(ids)
