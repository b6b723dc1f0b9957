"""The fused rotation against transformers' own code, float64 and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved_host
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as half_host

from clex.kernels import use
from clex.kernels.rotary import rotate

# Rows, heads of q, heads of k, tokens, size of a head, rotated pairs, rows of frequencies.
SHAPES = [
    (2, 3, 1, 37, 16, 8, 2),
    (1, 4, 2, 5, 20, 6, 1),
    (3, 2, 2, 70, 24, 12, 1),
    (2, 9, 3, 1, 12, 5, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Inputs:
    """Random queries, keys, positions and frequencies, all on one device."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, floats: bool = False
    ) -> None:
        rows, q_heads, k_heads, self.length, size, self.pairs, own = shape
        # As hosts make them: tokens before heads in memory; and keys that are a part of more.
        q = torch.randn(rows, self.length, q_heads, size)
        k = torch.randn(rows, self.length, k_heads, 2 * size)[..., 3 : size + 3]
        self.q, self.k = (x.to(device, dtype).transpose(1, 2).requires_grad_() for x in (q, k))
        self.k_parent = k
        positions = torch.randint(0, 500, (own, self.length), device=device)
        self.positions = positions + 0.25 if floats else positions
        self.inv_freq = torch.rand(own, self.pairs, device=device).requires_grad_()
        self.factor = (1 + torch.rand(own, device=device)).requires_grad_()
        self.dtype = dtype

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.inv_freq, self.factor]

    def rotated(self, interleaved: bool, dtype: torch.dtype | None = None) -> Any:
        tables = self.positions, self.inv_freq, self.factor
        return rotate(self.q, self.k, *tables, interleaved, dtype or self.dtype)

    def tables(self) -> list[Tensor]:
        """cos and sin as hosts make them, (B or 1, T, 2 F)."""
        angle = self.positions[..., None].float() * self.inv_freq[:, None]
        angle = torch.cat([angle, angle], dim=-1)
        return [(x * self.factor[:, None, None]).to(self.dtype) for x in (angle.cos(), angle.sin())]

    def exact(self, interleaved: bool, q: Tensor, k: Tensor, inv_freq: Tensor, a: Tensor) -> Any:
        """The definition, one complex product for each pair, in float64."""
        angle = self.positions[..., None].double() * inv_freq[:, None]
        turn = torch.polar(a[:, None, None].expand_as(angle), angle)[:, None]
        out = []
        for x in (q, k):
            rotated, rest = x[..., : 2 * self.pairs], x[..., 2 * self.pairs :]
            split = (-1, 2) if interleaved else (2, -1)
            parts = rotated.unflatten(-1, split)
            parts = parts if interleaved else parts.transpose(-1, -2)
            turned = torch.view_as_real(torch.view_as_complex(parts.contiguous()) * turn)
            turned = turned if interleaved else turned.transpose(-1, -2)
            out.append(torch.cat([turned.flatten(-2), rest], dim=-1))
        return out


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def nearly(x: Tensor, interleaved: bool, pairs: int) -> Tensor:
    """Each pair (a, b) as (a - b, b + a)."""
    split = slice(None, 2 * pairs)
    rotated = x[..., split].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    dim = -1 if interleaved else -2
    a, b = rotated.unbind(dim)
    out = x.clone()
    out[..., split] = torch.stack([a - b, b + a], dim=dim).flatten(-2)
    return out


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_follows_the_definition(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool
) -> None:
    inputs = Inputs(shape, dtype, device, floats=dtype == torch.float32)
    found = inputs.rotated(interleaved)
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves()]
    exact = inputs.exact(interleaved, *leaves)
    # Angles of 500 rad are off by 3e-5 in float32; Triton's interpreter cuts off, and does not
    # round, what bfloat16 has no room for.
    limit = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(found, exact, strict=True):
        assert off(a.detach(), b.detach()) < limit
        assert a.dtype == dtype
    # The output, turned a little: nothing cancels in the sums over tokens and heads.
    weights = [nearly(x.detach(), interleaved, inputs.pairs) for x in found]
    grads = torch.autograd.grad(found, inputs.leaves(), weights)
    wanted = torch.autograd.grad(exact, leaves, [w.double() for w in weights])
    for name, a, b in zip(("q", "k", "inv_freq", "factor"), grads, wanted, strict=True):
        assert off(a, b) < 4 * limit, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_bits_of_the_host(
    shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool
) -> None:
    inputs = Inputs(shape, dtype, "cuda")
    inputs.positions = inputs.positions * 1000  # beyond 105,615 rad sine has another path
    host = interleaved_host if interleaved else half_host
    theirs = host(inputs.q, inputs.k, *inputs.tables())
    for a, b in zip(inputs.rotated(interleaved), theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("host", [half_host, interleaved_host], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_form_gives_the_bits_of_the_host(
    shape: tuple[int, ...], dtype: torch.dtype, host: Callable[..., Any]
) -> None:
    inputs = Inputs(shape, dtype, "cpu")
    theirs = host(inputs.q, inputs.k, *inputs.tables())
    ours = inputs.rotated(host is interleaved_host)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_plain_gradients_are_those_of_autograd(interleaved: bool) -> None:
    inputs = Inputs(SHAPES[0], torch.float32, "cpu")
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves()]
    inputs.q, inputs.k, inputs.inv_freq, inputs.factor = leaves
    with use(kernels=False):
        found = inputs.rotated(interleaved, torch.float64)
    exact = inputs.exact(interleaved, *leaves)
    weights = [torch.randn_like(x) for x in exact]
    grads = torch.autograd.grad(found, leaves, weights)
    for a, b in zip(grads, torch.autograd.grad(exact, leaves, weights), strict=True):
        # The angles are float32, whatever the queries are.
        assert off(a, b) < 1e-4


def test_tables_may_be_wider_than_the_queries(device: str) -> None:
    """Under autocast: bfloat16 queries, and cos and sin of float32 hidden states."""
    inputs = Inputs(SHAPES[0], torch.bfloat16, device)
    found = inputs.rotated(False, torch.float32)
    leaves = [x.detach().double() for x in inputs.leaves()]
    for a, b in zip(found, inputs.exact(False, *leaves), strict=True):
        assert a.dtype == torch.float32
        assert off(a.detach(), b) < 5e-5
    grads = torch.autograd.grad(sum(x.sum() for x in found), inputs.leaves())
    assert [g.dtype for g in grads[:2]] == [torch.bfloat16] * 2


def test_nothing_is_kept_for_frequencies_that_do_not_learn() -> None:
    inputs = Inputs(SHAPES[0], torch.float32, "cpu")
    inputs.inv_freq, inputs.factor = inputs.inv_freq.detach(), inputs.factor.detach()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        inputs.rotated(False)
    assert sum(kept) < inputs.q.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_angles_far_out_are_as_good_as_float32_allows() -> None:
    position = 2_000_000
    inv_freq = torch.tensor([[1.0, 0.37, 1e-3, 1e-6]], device="cuda")
    q = torch.tensor([1.0] * 4 + [0.0] * 4, device="cuda").expand(1, 1, 1, 8)
    one = torch.ones(1, device="cuda")
    where = torch.full((1, 1), position, device="cuda")
    turned, _ = rotate(q, q, where, inv_freq, one, False, torch.float32)
    angle = position * inv_freq.double()
    exact = torch.cat([angle.cos(), angle.sin()], dim=-1)
    # Half a unit in the last place of the product; the reduction itself adds next to nothing.
    limit = (angle * 2**-24).repeat(1, 2) + 2e-7
    assert ((turned.flatten().double() - exact).abs() <= limit).all()
    product = (position * inv_freq).double()
    reduced = torch.cat([product.cos(), product.sin()], dim=-1)
    assert (turned.flatten().double() - reduced).abs().max() < 2e-7
    assert math.isfinite(float(turned.sum()))


def test_compiles_without_a_break() -> None:
    inputs = Inputs(SHAPES[0], torch.float32, "cpu")

    def work(q: Tensor, k: Tensor) -> Tensor:
        a, b = rotate(q, k, inputs.positions, inputs.inv_freq, inputs.factor, False, torch.float32)
        return a.sum() + (b * b).sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(inputs.q, inputs.k), work(inputs.q, inputs.k))


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiled_training_has_the_gradients_of_the_operator(interleaved: bool) -> None:
    inputs = Inputs(SHAPES[0], torch.float32, "cpu")
    learned = inputs.q, inputs.k, inputs.inv_freq, inputs.factor
    for x in learned:
        x.requires_grad_(True)

    def work(q: Tensor, k: Tensor, inv_freq: Tensor, factor: Tensor) -> Tensor:
        a, b = rotate(q, k, inputs.positions, inv_freq, factor, interleaved, torch.float32)
        return (a.sin() * a).sum() + (b * b * b).sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(
        torch.autograd.grad(compiled(*learned), learned),
        torch.autograd.grad(work(*learned), learned),
        strict=True,
    ):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        assert wanted.norm() > 0


def test_operator_is_sound() -> None:
    inputs = Inputs(SHAPES[1], torch.float32, "cpu")
    arguments = (inputs.q, inputs.k, inputs.positions, inputs.inv_freq, inputs.factor)
    torch.library.opcheck(torch.ops.clex.rotate, (*arguments, False, torch.float32))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("positions", lambda x: x[:, :-1], "positions of shape"),
        ("positions", lambda x: x.expand(3, -1), "positions of shape"),
        ("inv_freq", lambda x: x[:1].expand(3, -1), "inv_freq of shape"),
        ("inv_freq", lambda x: x.bfloat16(), "inv_freq was cast"),
        ("factor", lambda x: x[:1].expand(3), "factor of shape"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Any, message: str) -> None:
    """A kernel would read what lies behind, or turn by a wrong angle, without a word."""
    tables = {
        "positions": torch.arange(5)[None],
        "inv_freq": torch.rand(2, 4),
        "factor": torch.ones(2),
    }
    q = torch.randn(2, 2, 5, 8)
    rotate(q, q, *tables.values(), False, torch.float32)
    tables[name] = change(tables[name])
    with pytest.raises(ValueError, match=message):
        rotate(q, q, *tables.values(), False, torch.float32)
