"""`generate` of an extended model: one scale for each sequence, from first token to last."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .cache_scale import serving_scale
from .rotary import holding, ropes_of

# What transformers generates where no length is given.
_DEFAULT_NEW_TOKENS = 20


class Generate:
    """Takes the place of `generate` on one instance and holds the scale for the whole call.

    An object and not a bound method: it is copied and pickled with its model, where a method would
    be looked up by name and found to be the plain one.

    Args:
        model: the instance; itself an attribute of this instance afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        # A custom `generate` that came with the weights, if any.
        self.before = model.__dict__.get("generate")

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The `generate` that the model had."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).generate(self.model, *args, **kwargs)

    def __call__(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """See `transformers.GenerationMixin.generate`; a scale that the caller holds is kept.

        Raises:
            ConfigError: `past_key_values` was filled at a scale that is too small for this text.
        """
        with ExitStack() as held:
            # Continuous batching puts all prompts into one row, so no scale can be chosen for each.
            if kwargs.get("cache_implementation") != "paged":
                lengths = total_lengths(self.model, inputs, generation_config, kwargs)
                cache = kwargs.get("past_key_values")
                _hold(held, self.model, lengths, cache)
                # An assistant is called again and again, and its cache lives from call to call.
                models = [kwargs.get("assistant_model"), *args]
                for assistant in (model for model in models if isinstance(model, nn.Module)):
                    _hold(held, assistant, lengths)
            return self.plain(inputs, generation_config, *args, **kwargs)


class InitContinuousBatching:
    """Takes the place of `init_continuous_batching`, the door to every way of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.generation.ContinuousMixin.init_continuous_batching`.

        Raises:
            ConfigError: no scale is held.
        """
        rope = ropes_of(self.model)[0]
        if rope.scale is None and rope.clex_config.fixed_scale is None:
            raise ConfigError(
                "continuous batching packs requests of all lengths into one row, so each cannot"
                " have its own scale; hold one for all (with clex.at_scale(model, t)), or extend"
                " with fixed_scale"
            )
        return type(self.model).init_continuous_batching(self.model, *args, **kwargs)


def add_generation(model: nn.Module) -> None:
    """Give the instance a `generate` that holds the scale, if it can generate at all."""
    host: Any = model
    if callable(getattr(model, "generate", None)):
        host.generate = Generate(model)
    if hasattr(model, "init_continuous_batching"):
        host.init_continuous_batching = InitContinuousBatching(model)


def remove_generation(model: nn.Module) -> None:
    """Undo `add_generation`."""
    generate = model.__dict__.get("generate")
    if isinstance(generate, Generate):
        del model.__dict__["generate"]
        if generate.before is not None:
            model.__dict__["generate"] = generate.before
    if isinstance(model.__dict__.get("init_continuous_batching"), InitContinuousBatching):
        del model.__dict__["init_continuous_batching"]


def total_lengths(
    model: nn.Module, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]
) -> Tensor:
    """Tokens (B,) of each sequence when `generate` is done: real ones of the prompt, and new.

    The arguments are those of `generate`, with its order of precedence: arguments before
    `generation_config` before the model's own, and `max_new_tokens` before `max_length`.
    """
    host: Any = model

    def setting(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        values = (getattr(c, name, None) for c in (generation_config, host.generation_config))
        return next((value for value in values if value is not None), None)

    prompt = next(
        (
            p
            for p in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
            if p is not None
        ),
        None,
    )
    rows, width = (1, 1) if prompt is None else prompt.shape[:2]
    new, longest = setting("max_new_tokens"), setting("max_length")
    if new is None and longest is not None:
        new = longest - width
    elif new is None:
        limit = getattr(host.config, "max_position_embeddings", None)
        new = _DEFAULT_NEW_TOKENS
        new = new if limit is None else min(new, limit - width)
    real = _real_tokens(prompt, kwargs.get("attention_mask"), setting)
    if real is None:
        real = torch.full((rows,), width, device=next(model.parameters()).device)
    return real + max(int(new), 0)


def _real_tokens(prompt: Tensor | None, attention_mask: Any, setting: Any) -> Tensor | None:
    """Prompt tokens (B,) that are not padding; `None` where all are."""
    if isinstance(attention_mask, Tensor):
        return (attention_mask != 0).sum(dim=-1) if attention_mask.dim() == 2 else None
    # Without a mask transformers takes pad tokens for padding, unless they end texts as well.
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    ends = eos.tolist() if isinstance(eos, Tensor) else eos
    ends = ends if isinstance(ends, list) else [ends]
    if prompt is None or prompt.is_floating_point() or pad is None or int(pad) in ends:
        return None
    return (prompt != pad).sum(dim=-1)


def _hold(held: ExitStack, model: nn.Module, lengths: Tensor, cache: Any = None) -> None:
    """Hold the scale for texts of `lengths` tokens until `held` ends, if none is held."""
    rope = next(iter(ropes_of(model)), None)
    if rope is None or rope.scale is not None:
        return
    rope.warn_beyond(int(lengths.max()))
    scale = serving_scale(rope, cache, rope.scale_for(lengths))
    if bool((scale == scale[0]).all()):
        scale = scale[:1]  # one vector for all rows is less work
    with torch.no_grad():  # so that the frequencies are solved now, also in training mode
        held.enter_context(holding(model, scale))
