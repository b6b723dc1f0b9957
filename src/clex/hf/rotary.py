"""The module that takes the place of a model's rotary embedding."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import ConfigError
from ..kernels import active
from ..scaling import Scaling
from .fused import Angles, fuse

# Key of the only frequency vector of a model that has no layer types.
ALL_LAYERS = "all"

# Tokens of a batch from which on eager passes use the fused rotation.
FUSED_FROM = 2048


@dataclass
class ForwardPass:
    """A pass of the host that is under way while no scale is held.

    Attributes:
        scale: (B,) or (1,); ``None`` until the positions have decided.
    """

    scale: Tensor | None


class LayerAngles(NamedTuple):
    """What makes cos and sin of each layer, where layers have frequencies of their own.

    Attributes:
        rope: the rotary that they come from.
        inv_freq: (B or 1, layers, F).
        factor: on cos and sin, (B or 1, layers).
    """

    rope: ScaledRope
    inv_freq: Tensor
    factor: Tensor


@dataclass(eq=False)
class Hold:
    """A scale that is held, with its frequencies.

    Attributes:
        scale: float32, (1,) for all rows or (B,) for one a row.
        positions: table (B, T) float32 of sampled positions, indexed by `position_ids`; training
            only. It lives here because the host reads jumps in `position_ids` as document borders.
        solved: inv_freq and attention factor of each extended part, see `solved_at`; empty in
            training, where each forward pass solves them anew.
        training: whether the module was in training mode when they were solved.
    """

    scale: Tensor
    positions: Tensor | None
    solved: dict[str, tuple[Tensor, Tensor]]
    training: bool


class ScaledRope(nn.Module):
    """Calls the host's own rotary code with frequencies and temperature of the wanted scale.

    The host's formula (layout, partial rotation, complex form, half width) stays in charge: its
    undecorated forward runs on a view of the stock module in which `inv_freq` and
    `attention_scaling` are ours. The class name must not contain "RotaryEmbedding": transformers
    re-initialises every module that is called so.

    Args:
        stock: the rotary module of the host, kept unchanged for `restore`.
        scalings: a `Scaling` for each extended layer type, or one under `ALL_LAYERS`.

    Two threads may use one model: what a thread holds for itself is seen by no other.

    Attributes:
        interleaved: whether the pairs of the attention that `fuse` found are neighbours; ``None``:
            it was not fused, and always takes cos and sin.
        plain_attention: name of the attention that `restore` puts back, where the method brought
            its own (ALiBi).
    """

    def __init__(self, stock: nn.Module, scalings: Mapping[str, Scaling]) -> None:
        super().__init__()
        self.stock = stock
        self.scalings = nn.ModuleDict(scalings)
        self.plain_attention: str | None = None
        self.interleaved: bool | None = None
        self._own = threading.local()
        self._for_all: list[Hold] = []
        self._warned = False
        self._takes_rows = self._try_rows()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stock"), name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is held by nobody, and what belongs to threads cannot be copied.
        return {**self.__dict__, "_own": None, "_for_all": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_own": threading.local()})

    @property
    def held(self) -> Hold | None:
        """What is in force in this thread: its own, or else the last that was held for all."""
        own: Hold | None = getattr(self._own, "hold", None)
        # One slice: another thread may leave its block between two looks at the list.
        last = self._for_all[-1:]
        return last[0] if own is None and last else own

    @property
    def scale(self) -> Tensor | None:
        """The scale that is held; ``None``: each row takes that of its own length in the call."""
        held = self.held
        return None if held is None else held.scale

    @property
    def forward_pass(self) -> ForwardPass | None:
        """The pass of the host that this thread is in, while no scale is held.

        Set by `clex.hf.forward_pass`, which knows the real tokens of each row; positions alone do
        not tell them.
        """
        current: ForwardPass | None = getattr(self._own, "forward_pass", None)
        return current

    @forward_pass.setter
    def forward_pass(self, current: ForwardPass | None) -> None:
        self._own.forward_pass = current

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the host's rotary returns: cos and sin (or a complex table), in the dtype of `x`.

        On a GPU fused attention gets (positions, `Angles`) instead. Where layers have frequencies
        of their own it is for all layers at once, and `of_layer` takes that of one.
        """
        key = ALL_LAYERS if layer_type is None else layer_type
        if key not in self.scalings:
            extra = () if layer_type is None else (layer_type,)
            return self.stock(x, position_ids, *extra)
        held = self.held
        positions = None if held is None else held.positions
        inv_freq, factor = self._frequencies(key, position_ids, held)
        rows = x.shape[-3]  # Gemma 3n stacks four streams before the batch
        if len(inv_freq) not in (1, rows):
            inv_freq, factor = spread(inv_freq, rows), spread(factor, rows)
        if position_ids.shape[-2] == 1 < rows and (len(inv_freq) > 1 or positions is not None):
            position_ids = position_ids.expand(*position_ids.shape[:-2], rows, -1)
        if positions is not None:
            table = positions.to(x.device).expand(position_ids.shape[-2], -1)
            position_ids = table.gather(1, position_ids)
        if self.interleaved is not None and position_ids.dim() == 2 and _worth_it(x, position_ids):
            factor = self._with_stock(factor, layer_type)
            return position_ids, Angles(inv_freq, factor, self.interleaved, x.dtype)
        if inv_freq.dim() == 3:
            return position_ids, LayerAngles(self, inv_freq, factor)
        return self._call(x, position_ids, inv_freq, factor, layer_type)

    def _frequencies(
        self, key: str, position_ids: Tensor, held: Hold | None
    ) -> tuple[Tensor, Tensor]:
        """See `solved_at`; B is 1 where all rows share a scale."""
        if held is not None and not torch.is_grad_enabled() and held.training == self.training:
            solved = held.solved.get(key)
            if solved is not None:
                return solved
        scaling: Any = self.scalings[key]
        t = self._scale_in_force(position_ids) if held is None else held.scale
        return solved_at(scaling, t)

    def _scale_in_force(self, position_ids: Tensor) -> Tensor:
        current = self.forward_pass
        if current is not None and current.scale is not None:
            return current.scale
        lengths = position_ids.amax(dim=-1) + 1
        scale = self.scale_for(lengths if lengths.dim() == 1 else lengths.amax(dim=0))
        if current is not None:
            current.scale = scale
        return scale

    @property
    def clex_config(self) -> ClexConfig:
        """The config of the extension."""
        config: ClexConfig = self._first.config
        return config

    @property
    def native_length(self) -> int:
        """Tokens that the host was trained to read."""
        return int(self._first.spec.native_length)

    @property
    def layers(self) -> int:
        """Layers that have frequencies of their own; 1: all share theirs."""
        return int(self._first.spec.layers)

    @property
    def _first(self) -> Any:
        return next(iter(self.scalings.values()))

    def scale_for(self, lengths: Tensor) -> Tensor:
        """The scales for texts of `lengths` tokens, (B,), on the device of the frequencies."""
        first = self._first
        scale: Tensor = first.scale_for(lengths.to(first.inv_freq_native.device))
        return scale

    def warn_beyond(self, tokens: int) -> None:
        """Say once that a text of so many `tokens` is longer than the largest scale covers."""
        config = self.clex_config
        most = config.max_scale * self.native_length
        if self._warned or tokens <= most or config.fixed_scale is not None:
            return
        self._warned = True
        warnings.warn(
            f"{tokens} tokens are more than the {most:.0f} that max_scale {config.max_scale:g}"
            " covers; texts go on at that scale",
            stacklevel=4,
        )

    def solve(self, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`solved_at` for `scale` (B,), for each extended part."""
        solved = {}
        for key, module in self.scalings.items():
            scaling: Any = module
            t = scale.to(scaling.inv_freq_native.device)
            solved[key] = solved_at(scaling, t)
        return solved

    @contextmanager
    def hold(
        self, scale: float | Tensor, positions: Tensor | None = None, *, for_all: bool = False
    ) -> Iterator[None]:
        """Hold a scale inside the block, its frequencies solved once for inference.

        Solved now and not at the first use: that may be inside a compiled graph. They are not keyed
        on the state of the parameters, since fused optimisers change those without raising their
        version; what was held before is solved anew when the block ends.

        Args:
            scale: one for all rows, or (B,).
            positions: sampled positions (B, T), training only.
            for_all: in every thread that holds none of its own; else in this thread alone.
        """
        device = self._first.inv_freq_native.device
        scale = torch.as_tensor(scale, dtype=torch.float32, device=device).reshape(-1)
        hold = Hold(scale, positions, {}, self.training)
        self._solve_held(hold)
        before: Hold | None = getattr(self._own, "hold", None)
        self._own.hold = hold
        if for_all:
            self._for_all.append(hold)
        try:
            yield
        finally:
            if for_all:
                self._for_all.remove(hold)
            # First: solving may fail, out of memory, and the inner scale must not stay.
            self._own.hold = before
            if before is not None:
                self._solve_held(before)

    def _solve_held(self, hold: Hold) -> None:
        hold.training = self.training
        if self.training and torch.is_grad_enabled():
            hold.solved = {}
            return
        with torch.no_grad():
            hold.solved = self.solve(hold.scale)

    def _call(
        self,
        x: Tensor,
        position_ids: Tensor,
        inv_freq: Tensor,
        factor: Tensor,
        layer_type: str | None,
    ) -> Any:
        if len(inv_freq) == 1:
            return self._host(x, position_ids, inv_freq[0], factor[0], layer_type)
        if self._takes_rows:
            rows = inv_freq[:, None, :], factor[:, None, None]
            return self._host(x, position_ids, *rows, layer_type)
        parts = [
            self._host(x[i : i + 1], position_ids[..., i : i + 1, :], f, a, layer_type)
            for i, (f, a) in enumerate(zip(inv_freq, factor, strict=True))
        ]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=-3)
        return tuple(torch.cat(part, dim=-3) for part in zip(*parts, strict=True))

    def _host(
        self,
        x: Tensor,
        position_ids: Tensor,
        inv_freq: Tensor,
        factor: Tensor,
        layer_type: str | None,
    ) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        factor = self._with_stock(factor, layer_type)
        view = _View(
            self.stock,
            {
                f"{prefix}inv_freq": inv_freq,
                f"{prefix}attention_scaling": factor,
                # Phi-MoE computes its frequencies anew in each call.
                "rope_init_fn": lambda *_: (inv_freq, factor),
            },
        )
        extra = () if layer_type is None else (layer_type,)
        raw_forward = inspect.unwrap(type(self.stock).forward)
        return raw_forward(view, x, position_ids, *extra)

    def _with_stock(self, factor: Tensor, layer_type: str | None) -> Tensor:
        """`factor` times that of the host's own rotary, which is 1 in nearly all."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        own = getattr(self.stock, f"{prefix}attention_scaling")
        return factor if own == 1 else factor * own

    def fuse(self, decoder: nn.Module) -> None:
        """Let the attention of `decoder` rotate in one kernel where the model is on a GPU."""
        key, scaling = next(iter(self.scalings.items()))
        layer_type = None if key == ALL_LAYERS else key
        native: Any = scaling.inv_freq_native

        def tables(x: Tensor, position_ids: Tensor, inv_freq: Tensor, factor: Tensor) -> Any:
            pair = self._call(x, position_ids, inv_freq, factor, layer_type)
            return pair, self._with_stock(factor, layer_type)

        try:
            with torch.no_grad():
                self.interleaved = fuse(decoder, self, tables, native)
        except Exception as error:
            # Triton needs a C compiler and a GPU that is new enough; the host needs neither.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"the fused rotation cannot run here ({reason}); CLEX_NO_KERNELS=1 switches all"
                " kernels off",
                stacklevel=2,
            )

    def _try_rows(self) -> bool:
        """Whether the host's code takes one frequency vector a row, as recent releases do."""
        key = next(iter(self.scalings))
        layer_type = None if key == ALL_LAYERS else key
        scaling: Any = self.scalings[key]
        native = scaling.inv_freq_native
        inv_freq = torch.stack([native, native / 2])
        factor = torch.tensor([1.0, 2.0], device=native.device)
        x = torch.zeros(2, 3, 1, device=native.device)
        position_ids = torch.arange(3, device=native.device).expand(2, 3)
        self._takes_rows = False
        with torch.no_grad():
            one_by_one = self._call(x, position_ids, inv_freq, factor, layer_type)
            self._takes_rows = True
            try:
                together = self._call(x, position_ids, inv_freq, factor, layer_type)
            except (RuntimeError, IndexError):
                return False
        one_by_one = [one_by_one] if isinstance(one_by_one, Tensor) else one_by_one
        together = [together] if isinstance(together, Tensor) else together
        return all(
            a.shape == b.shape and torch.allclose(a, b)
            for a, b in zip(one_by_one, together, strict=True)
        )


def solved_at(scaling: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a rotary needs of a `Scaling` at scales `t` (B,).

    Returns:
        inv_freq (B, F) and attention factor (B,); (B, layers, F) and (B, layers) where layers have
        curves of their own.
    """
    if scaling.spec.layers > 1:
        return scaling.layer_inv_freq(t), scaling.layer_attention_factor(t)
    return scaling.inv_freq(t), scaling.attention_factor(t)


def of_layer(layer: Tensor, x: Tensor, pair: Any) -> Any:
    """The position embeddings of one layer, from those that the decoder gives to all.

    Args:
        layer: its number, int64 (1,), where the frequencies are.
        x: hidden states, for their dtype and device.
        pair: what `ScaledRope.forward` returned; what has no part for each layer stays as it is.
    """
    position_ids, angles = pair
    if not isinstance(angles, LayerAngles) and not (
        isinstance(angles, Angles) and angles.inv_freq.dim() == 3
    ):
        return pair
    inv_freq = angles.inv_freq.index_select(1, layer)[:, 0]
    factor = angles.factor.index_select(1, layer)[:, 0]
    if isinstance(angles, LayerAngles):
        return angles.rope._call(x, position_ids, inv_freq, factor, None)
    return position_ids, Angles(inv_freq, factor, angles.interleaved, angles.dtype)


def _worth_it(x: Tensor, position_ids: Tensor) -> bool:
    """Whether the fused rotation is the faster one; both give the same bits."""
    if not active(x):
        return False
    # Few tokens do not fill the GPU: a step of decoding takes as long as the host needs to launch
    # it, and an operator of ours takes the host longer than the launches that it saves. In a graph,
    # compiled or captured, launches are free.
    return (
        position_ids.numel() >= FUSED_FROM
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    )


def spread(per_row: Tensor, rows: int) -> Tensor:
    """One entry for each of `rows`: beams and returned sequences stand beside their prompt.

    Raises:
        ConfigError: the batch is not a multiple of the entries.
    """
    if len(per_row) == rows:
        return per_row
    if rows % len(per_row):
        raise ConfigError(f"{len(per_row)} scales are held for a batch of {rows} rows")
    return per_row.repeat_interleave(rows // len(per_row), dim=0)


def ropes_of(model: nn.Module) -> list[ScaledRope]:
    """Every extended rotary of `model`, found anew: wrappers such as PEFT copy modules."""
    return [module for module in model.modules() if isinstance(module, ScaledRope)]


@contextmanager
def holding(
    model: nn.Module,
    scale: float | Tensor,
    positions: Tensor | None = None,
    *,
    for_all: bool = False,
) -> Iterator[None]:
    """Hold a scale in every rotary of `model` inside the block; see `ScaledRope.hold`."""
    with ExitStack() as stack:
        for rope in ropes_of(model):
            stack.enter_context(rope.hold(scale, positions, for_all=for_all))
        yield


class _View:
    """A stock module with some attributes replaced, without touching the module."""

    def __init__(self, stock: nn.Module, replaced: dict[str, Any]) -> None:
        self._stock = stock
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        return getattr(self._stock, name)
