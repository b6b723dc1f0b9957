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
        turn_keys(
            [store.transpose(1, 2) for store in stores], 4, positions, delta, ratio, interleaved, 16
        )
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


@pytest.mark.parametrize("programs", [1, 3], ids=str)
def test_a_program_turns_many_heads(
    device: str, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    monkeypatch.setattr("clex.kernels.cache_move_triton._PROGRAMS", programs)
    # Three layers in a row and two with tokens before heads, 15 heads and 10: all alike but these.
    keys = [torch.randn(1, 5, 9, 8, device=device) for _ in range(3)]
    keys += [torch.randn(1, 9, 5, 8, device=device).transpose(1, 2) for _ in range(2)]
    before = [tensor.clone() for tensor in keys]
    positions = torch.arange(9, device=device, dtype=torch.float64)[None]
    delta = torch.rand(1, 4, device=device, dtype=torch.float64)
    one = torch.ones(1, device=device)
    turn_keys(keys, 0, positions, delta, one, False, 16)
    for tensor, old in zip(keys, before, strict=True):
        wanted = exact(old, positions, delta, one, False)
        assert (tensor.double() - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("start", "slots", "rows"), [(1, 5, 1), (0, 6, 1), (0, 5, 3)], ids=["entries", "slots", "rows"]
)
def test_what_does_not_fit_is_refused(start: int, slots: int, rows: int) -> None:
    """A kernel would write what lies behind, without a word."""
    keys = [torch.randn(2, 2, 5, 8)]
    positions, delta = torch.zeros(1, slots).double(), torch.rand(rows, 4).double()
    with pytest.raises(ValueError, match="for keys of 2 rows, 5 slots and 8 entries"):
        turn_keys(keys, start, positions, delta, torch.ones(1), False, 2)
