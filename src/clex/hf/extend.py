"""Extending a model instance, and taking the extension back."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import ConfigError, UnsupportedModelError
from ..scaling import Scaling, get_scaling
from .alibi import add_alibi, remove_alibi
from .discovery import find_rotary, freq_name, rope_specs
from .forward_pass import add_hooks, attention_layers, remove_hooks
from .fused import unfuse
from .generation import add_generation, remove_generation
from .rotary import ALL_LAYERS, ScaledRope, holding, of_layer

ModelT = TypeVar("ModelT", bound=nn.Module)


def extend(model: ModelT, config: ClexConfig | None = None) -> ModelT:
    """Give one model instance frequencies that follow the length of the text.

    Only the instance's rotary module is replaced; nothing else of the model or of transformers is
    touched, and other models in the process stay as they are. At t = 1 the logits are bit-equal
    to the plain model's.

    Args:
        model: a RoPE decoder of transformers, on any device, in any dtype.
        config: what to do; `ClexConfig()` if not given.

    Returns:
        The same instance.

    Raises:
        UnsupportedModelError: no rotary module of the common form, or one that would not react.
        ConfigError: a value is unknown or contradicts the model; the model is then unchanged.
    """
    config = config or ClexConfig()
    if extension_of(model) is not None:
        raise ConfigError("the model is extended already; call clex.restore(model) first")
    parent, name, stock = find_rotary(model)
    specs = rope_specs(model, stock, config)
    scaling_type = get_scaling(config.method)
    rope = ScaledRope(stock, {key: scaling_type(spec, config) for key, spec in specs.items()})
    rope.to(next(model.parameters()).device)
    rope.train(model.training)
    _check_effect(model, rope, config)
    if rope.layers > 1:
        attention_layers(parent, name, rope.layers)  # raises where layers cannot have their own
    if not scaling_type.rotates:
        rope.plain_attention = add_alibi(model)
    setattr(parent, name, rope)
    rope.fuse(parent)
    add_hooks(parent, name)
    add_generation(model)
    return model


def restore(model: ModelT) -> ModelT:
    """Put the stock rotary module back. Does nothing to a model that is not extended."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ScaledRope):
                setattr(module, name, child.stock)
                if child.plain_attention is not None:
                    remove_alibi(model, child.plain_attention)
    for module in list(model.modules()):
        unfuse(module)
        remove_hooks(module)
        remove_generation(module)
    return model


def extension_of(model: nn.Module) -> ScaledRope | None:
    """The extension of `model` that is in use, found anew each time: PEFT copies modules."""
    # Level by level: a rotary stands beside the layers, and is found before a look into them.
    queue, seen = deque([model]), {model}
    while queue:
        module = queue.popleft()
        if isinstance(module, ScaledRope):
            return module
        if isinstance(module, ModulesToSaveWrapper):
            # It keeps the module that training began with beside the one that was trained.
            wrapper: Any = module
            name = next(iter(wrapper.active_adapters), None)
            used = None if wrapper.disable_adapters else wrapper.modules_to_save[name]
            if isinstance(used, ScaledRope):
                return used
        below = [child for child in module.children() if child not in seen]
        seen.update(below)
        queue.extend(below)
    return None


def require_extension(model: nn.Module) -> ScaledRope:
    """Like `extension_of`, for callers that cannot go on without.

    Raises:
        ConfigError: the model is not extended.
    """
    rope = extension_of(model)
    if rope is None:
        raise ConfigError(f"this {type(model).__name__} is not extended; call clex.extend first")
    return rope


def config_of(model: nn.Module) -> ClexConfig:
    """The config that `model` was extended with, `native_length` filled in."""
    scaling: Any = next(iter(require_extension(model).scalings.values()))
    config: ClexConfig = scaling.config
    return config.replace(
        native_length=scaling.spec.native_length, options=scaling_options(scaling)
    )


def scaling_options(scaling: Scaling) -> dict[str, Any]:
    """The options that a scaling was made with (a learned one passes them to its base)."""
    base: Any = getattr(scaling, "base", scaling)
    return dict(base.config.options)


@contextmanager
def at_scale(
    model: nn.Module,
    t: float | Sequence[float] | Tensor,
    positions: Tensor | None = None,
) -> Iterator[None]:
    """Hold the length scale at `t` inside the block.

    Use it around generation: keys are cached after rotation, so t must not change while a cache
    lives. Without it each forward call takes t from its own largest position.

    The block holds for the model, also in threads that are started inside it (such as a worker that
    generates for a streamer); a thread that is in a block of its own, or in a `generate` that chose
    t itself, keeps to that.

    Args:
        model: an extended model.
        t: one scale for all rows, or one for each row of the batch; at least 1.
        positions: sampled positions (B, T) for training, see `clex.positions`.

    Raises:
        ConfigError: a scale is below 1, or the model is not extended.
    """
    require_extension(model)
    scale: float | Tensor
    if isinstance(t, int | float):
        scale = _checked_scale(float(t), config_of(model).max_scale)
    elif not isinstance(t, Tensor):
        most = config_of(model).max_scale
        scale = torch.tensor([_checked_scale(float(value), most) for value in t])
    else:
        # A tensor may live on a device, where reading its values to check them would wait.
        scale = t.reshape(-1)
    with holding(model, scale, positions, for_all=True):
        yield


def frequencies(model: nn.Module, t: float) -> Tensor | dict[str, Tensor]:
    """The inv_freq that an extended model uses at scale `t`.

    Returns:
        float32, shape (F,), radians per token; a dictionary by layer type for models that have one
        rotary for each. Where layers have curves of their own: their geometric mean.

    Raises:
        ConfigError: `t` is below 1, or the model is not extended.
    """
    rope = require_extension(model)
    t = _checked_scale(float(t), config_of(model).max_scale)
    result = {}
    with torch.no_grad():
        for key, module in rope.scalings.items():
            scaling: Any = module
            result[key] = scaling.inv_freq(
                torch.tensor([t], device=scaling.inv_freq_native.device)
            )[0].clone()
    return result[ALL_LAYERS] if list(result) == [ALL_LAYERS] else result


def scale_for(model: nn.Module, length: int) -> float:
    """The scale t that an extended model uses for a text of `length` tokens, on its grid."""
    scaling: Any = next(iter(require_extension(model).scalings.values()))
    return float(scaling.scale_for(torch.tensor(length)))


def _checked_scale(t: float, max_scale: float) -> float:
    if not t >= 1:
        raise ConfigError(f"the scale must be at least 1, not {t}")
    if t > max_scale:
        warnings.warn(
            f"scale {t:g} is above max_scale {max_scale:g} and is used as {max_scale:g}",
            stacklevel=4,
        )
        return max_scale
    return t


def _check_effect(model: nn.Module, rope: ScaledRope, config: ClexConfig) -> None:
    """Fail where the extension would change nothing, or would change the short window."""
    if config.max_scale <= 1:
        raise ConfigError(f"max_scale must be above 1, not {config.max_scale:g}")
    key, scaling = next(iter(rope.scalings.items()))
    assert isinstance(scaling, Scaling)
    device = scaling.inv_freq_native.device
    layer_type = () if key == ALL_LAYERS else (key,)
    x = torch.zeros(1, 8, 1, device=device)
    position_ids = torch.arange(8, device=device)[None]

    def tables(t: float) -> list[Tensor]:
        with rope.hold(t):
            table = rope(x, position_ids, *layer_type)
            if rope.layers > 1:
                table = of_layer(torch.zeros(1, dtype=torch.int64, device=device), x, table)
        return [table] if isinstance(table, Tensor) else list(table)

    with torch.no_grad():
        stock = rope.stock(x, position_ids, *layer_type)
        stock = [stock] if isinstance(stock, Tensor) else list(stock)
        one, most = tables(1.0), tables(config.max_scale)
    name = f"{type(model).__name__} ({type(rope.stock).__name__})"
    same = all(torch.equal(a, b) for a, b in zip(stock, one, strict=True))
    fresh = scaling.inv_freq_native.cpu().equal(getattr(rope.stock, freq_name(key)).cpu())
    if scaling.exact_at_one and fresh and not same:
        raise UnsupportedModelError(f"{name} does not give its own table back at t = 1")
    off = one if scaling.exact_at_one else stock
    if (config.method != "none" or config.post) and all(
        torch.equal(a, b) for a, b in zip(off, most, strict=True)
    ):
        raise UnsupportedModelError(
            f"{name} does not react to its frequencies; nothing would change"
        )
