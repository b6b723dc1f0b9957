"""Rotating queries and keys by per-row frequencies, without tables of cos and sin in memory.

The angles are float32, ``position * inv_freq``, as in the host models, and every intermediate is
rounded where their code rounds it, so that the result equals theirs bit for bit. Backward, queries
and keys turn by the negative angle. The gradients of `inv_freq` and of the attention factor are
taken from the outputs, which attention keeps for itself anyway: a derivative of a rotation is the
rotated vector, turned by a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import token_major
from .switch import active, has_triton


def rotate(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    factor: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Queries and keys after rotary embedding; differentiable in all but `positions`.

    Args:
        q: (B, heads, T, D), any strides.
        k: (B, key heads, T, D), any strides.
        positions: (B or 1, T), integers or float32.
        inv_freq: (B or 1, F) float32 with 2 F <= D; entries of a head behind 2 F stay as they are.
        factor: (B or 1,) float32, on cos and sin.
        interleaved: whether pairs are neighbours (0, 1), (2, 3) ..., or halves (0, F) ...
        dtype: of cos and sin; the result has that of their product with `q` and `k`.

    Raises:
        ValueError: shapes do not fit, or the frequencies were cast, as FSDP's mixed precision does
            unless ``cast_forward_inputs`` is off.
    """
    inputs = q, k, positions, inv_freq, factor, interleaved, dtype
    if torch.compiler.is_compiling():
        return rotate_operator(*inputs)
    # An operator costs the host as much again as the launch of its kernel.
    turned: tuple[Tensor, Tensor] = _Rotate.apply(*inputs)
    return turned


def _rotate(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    factor: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows, tokens = q.shape[0], q.shape[2]
    for table, what in ((positions, "positions"), (inv_freq, "inv_freq"), (factor, "factor")):
        if len(table) not in (1, rows) or (table is positions and table.shape[1] != tokens):
            raise ValueError(
                f"{what} of shape {tuple(table.shape)} for {rows} rows of {tokens} tokens"
            )
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"inv_freq was cast to {inv_freq.dtype}, which is wrong by whole radians; with FSDP set"
            " MixedPrecisionPolicy(cast_forward_inputs=False), or switch the kernels off"
        )
    if active(q):
        from .rotary_triton import forward

        return forward(q, k, positions, inv_freq, factor, interleaved, dtype)
    cos, sin = _cos_sin(positions, inv_freq, factor, dtype)
    q, k = (
        token_major(x, torch.promote_types(x.dtype, dtype)).copy_(_turned(x, cos, sin, interleaved))
        for x in (q, k)
    )
    return q, k


def _operator(name: str, function: Callable[..., Any]) -> Any:
    """`function` as an operator, in which the compiler sees kernels and launches them itself.

    So a compiled model does not wait for Python twice in each layer. Without Triton the compiler
    takes it as it is.
    """
    if has_triton():
        return torch.library.triton_op(name, function, mutates_args=())
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(function)
    return operator


rotate_operator = _operator("clex::rotate", _rotate)


def _rotate_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    out: list[Tensor],
    positions: Tensor,
    inv_freq: Tensor,
    factor: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k; and of the frequencies and the factor of each row, (B, F + 1).

    Args:
        out: both outputs of `rotate`, or nothing: then there are no rows in the third result.
    """
    if active(grad_q):
        from .rotary_triton import backward

        return backward(
            grad_q, grad_k, out, positions, inv_freq, factor, interleaved, dtype, q_dtype, k_dtype
        )
    cos, sin = _cos_sin(positions, inv_freq, factor, dtype)
    grads = [
        token_major(x, x_dtype).copy_(_turned(x, cos, -sin, interleaved))
        for x, x_dtype in ((grad_q, q_dtype), (grad_k, k_dtype))
    ]
    if not out:
        return grads[0], grads[1], inv_freq.new_empty(0, inv_freq.shape[1] + 1)
    by_row = []
    for grad, rotated in zip((grad_q, grad_k), out, strict=True):
        g, o = (_pairs(x.float(), inv_freq.shape[1], interleaved) for x in (grad, rotated))
        turn = (g[1] * o[0] - g[0] * o[1]).sum(1) * positions[..., None]
        size = (g[0] * o[0] + g[1] * o[1]).sum((1, 2, 3)) / factor
        by_row.append(torch.cat([turn.sum(1), size[:, None]], dim=1))
    return grads[0], grads[1], by_row[0] + by_row[1]


backward_operator = _operator("clex::rotate_backward", _rotate_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, positions, inv_freq, factor, *ctx.settings = inputs
    ctx.settings += [q.dtype, k.dtype]
    ctx.learned = inv_freq.requires_grad or factor.requires_grad
    kept = output if ctx.learned else ()
    ctx.save_for_backward(positions, inv_freq, factor, *kept)


def _backward(ctx: Any, work: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    positions, inv_freq, factor, *out = ctx.saved_tensors
    *grads, by_row = work(grad_q, grad_k, out, positions, inv_freq, factor, *ctx.settings)
    if not ctx.learned:
        return *grads, None, None, None, None, None
    # One row of frequencies, or of factors, may serve all rows of the batch.
    learned = by_row[:, :-1].sum_to_size(inv_freq.shape), by_row[:, -1].sum_to_size(factor.shape)
    return *grads, None, *learned, None, None


rotate_operator.register_autograd(
    lambda ctx, *grads: _backward(ctx, backward_operator, *grads), setup_context=_setup
)


class _Rotate(torch.autograd.Function):
    """The same outside of the compiler."""

    forward = staticmethod(_rotate)
    setup_context = staticmethod(_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, _rotate_backward, *grads)


def _cos_sin(
    positions: Tensor, inv_freq: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    angle = positions[..., None].float() * inv_freq[:, None, :]
    cos, sin = angle.cos() * factor[:, None, None], angle.sin() * factor[:, None, None]
    return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    size = cos.shape[-1]
    first, second = _pairs(x, size, interleaved)
    turned = first * cos - second * sin, second * cos + first * sin
    rest = x[..., 2 * size :].to(turned[0].dtype)
    if interleaved:
        return torch.cat([torch.stack(turned, dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([*turned, rest], dim=-1)


def _pairs(x: Tensor, size: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0 : 2 * size : 2], x[..., 1 : 2 * size : 2]
    return x[..., :size], x[..., size : 2 * size]
