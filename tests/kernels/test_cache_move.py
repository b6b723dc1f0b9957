"""Turning keys in place: the kernel and the plain form against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clex.kernels.cache_move import turn_keys


def exact(
    keys: Tensor, positions: Tensor, delta: Tensor, ratio: Tensor, neighbours: bool
) -> Tensor:
    angle = positions[:, :, None] * delta[:, None, :]
    turn = torch.polar(ratio.double()[:, None, None].expand_as(angle), angle)[:, None]
    pairs = keys.double().unflatten(-1, (-1, 2) if neighbours else (2, -1))
    pairs = pairs if neighbours else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned if neighbours else turned.transpose(-1, -2)).flatten(-2)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "by row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["kernel", "plain"])
def test_keys_turn_in_place(
    request: pytest.FixtureRequest, form: str, dtype: torch.dtype, rows: int, interleaved: bool
) -> None:
    device = request.getfixturevalue("device") if form == "kernel" else "cpu"
    with torch.inference_mode():
        # Layers of two sizes, of which only entries 4 to 16 and the first slots are rotated.
        stores = [torch.randn(2, 70, heads, 20, device=device).to(dtype) for heads in (3, 3, 1)]
        before = [store.clone() for store in stores]
        positions = torch.randint(0, 2_000_000, (rows, 67), device=device).double()
        delta = torch.rand(rows, 6, device=device, dtype=torch.float64)
        ratio = 1 + torch.rand(rows, device=device)
        turn_keys([store.transpose(1, 2) for store in stores], 4, positions, delta, ratio, interleaved, 16)
        for store, old in zip(stores, before, strict=True):
            turned = store.transpose(1, 2)[:, :, :67, 4:16]
            wanted = exact(
                old.transpose(1, 2)[:, :, :67, 4:16], positions, delta, ratio, interleaved
            )
            # The interpreter cuts off where bfloat16 rounds.
            limit = 1e-6 if dtype == torch.float32 else 6e-3
            assert (turned.double() - wanted).norm() < limit * wanted.norm()
            assert torch.equal(store[..., :4], old[..., :4])
            assert torch.equal(store[..., 16:], old[..., 16:])
            assert torch.equal(store[:, 67:], old[:, 67:])
