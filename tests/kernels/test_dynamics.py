"""The kernel of the dynamics against the plain solver in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clex.config import ClexConfig
from clex.rope import RopeSpec
from clex.scaling.clex import Clex


def make(activation: str, steps: int, base: str = "dynamic_ntk", layers: int = 1) -> Clex:
    index = torch.arange(0, 20, 2, dtype=torch.float32)
    spec = RopeSpec(1.0 / 10_000.0 ** (index / 20), 512, 10_000.0, layers=layers)
    config = ClexConfig(
        activation=activation,
        steps=steps,
        width=0.3,
        base=base,
        per_layer="none" if layers == 1 else "curve",
    )
    scaling = Clex(spec, config)
    for parameter in scaling.field.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return scaling


def gradients(scaling: Clex, residual: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 2, residual.numel(), device=residual.device)
    total = (residual * weights.view_as(residual)).sum()
    return list(torch.autograd.grad(total, list(scaling.field.parameters())))


@pytest.mark.parametrize(
    ("activation", "base", "layers"), [("tanh", "dynamic_ntk", 1), ("silu", "yarn", 3)]
)
def test_kernel_solves_and_differentiates_the_steps(
    device: str, activation: str, base: str, layers: int
) -> None:
    scaling = make(activation, 3, base, layers).to(device)
    t = torch.tensor([1.0, 1.7, 12.0], device=device)
    found = scaling._kernel(t)
    grads = gradients(scaling, found)
    assert found.shape == (3, 10 * layers)
    assert (found[0] == 0).all()

    exact: Any = make(activation, 3, base, layers)
    exact.load_state_dict(scaling.cpu().state_dict())
    for module in exact.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                table[name] = type(tensor)(tensor.data.double())
    wanted = exact._solve(t.double().cpu())
    assert (found.cpu().double() - wanted).abs().max() < 2e-6 * wanted.abs().max()
    for a, b in zip(grads, gradients(exact, wanted), strict=True):
        assert (a.cpu().double() - b).norm() < 1e-5 * b.norm()


def test_an_untrained_field_leaves_the_base_alone(device: str) -> None:
    scaling = make("tanh", steps=2)
    field: Any = scaling.field
    for parameter in (field.outer.weight, field.outer.bias, field.own):
        torch.nn.init.zeros_(parameter)
    assert (scaling.to(device)._kernel(torch.tensor([3.0], device=device)) == 0).all()


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({}, True),
        ({"preset": "paper"}, False),
        ({"base": "yarn"}, True),
        ({"solver": "dopri5"}, False),
    ],
    ids=str,
)
def test_the_kernel_is_for_the_modulated_field(changes: dict[str, Any], has: bool) -> None:
    index = torch.arange(0, 20, 2, dtype=torch.float32)
    spec = RopeSpec(1.0 / 10_000.0 ** (index / 20), 512, 10_000.0)
    assert Clex(spec, ClexConfig(**changes)).has_kernel is has
