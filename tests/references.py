"""What the formulas should give: slow, obvious, in numpy float64, sharing no code with clex."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from clex.rope import RopeSpec

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's configuration that its rotary embedding depends on."""

    head_dim: int
    theta: float
    partial: float = 1.0
    native_length: int = 2048

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial)

    def __str__(self) -> str:
        return f"d{self.head_dim}-b{self.theta:g}-p{self.partial:g}-L{self.native_length}"


def make_spec(shape: Shape) -> RopeSpec:
    """The model's own frequencies, in float32 as transformers computes them."""
    d = shape.rotary_dim
    inv_freq = 1.0 / (shape.theta ** (torch.arange(0, d, 2, dtype=torch.float) / d))
    return RopeSpec(inv_freq, shape.native_length, shape.theta)


def assert_close(actual: Tensor | Vector, expected: ArrayLike, tolerance: float) -> None:
    """Relative agreement entry by entry; a failure names the largest difference and its index.

    What was found is printed as well: ``pytest -rP`` shows how far inside its tolerance a test is.
    """
    actual = actual.detach().double().numpy() if isinstance(actual, Tensor) else actual
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    difference = np.abs(actual - expected) / np.maximum(np.abs(expected), 1e-300)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    print(f"deviation {difference[worst]:.2e} of {tolerance:.0e} allowed")
    assert np.all(difference <= tolerance), (
        f"largest relative difference {difference[worst]:.3g} (tolerance {tolerance:g}) at index"
        f" {tuple(int(i) for i in worst)}: {actual[worst]!r}, expected {expected[worst]!r}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Bit equality; a failure names the largest difference and its index."""
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    assert_close(actual, expected.detach().double().numpy(), 0.0)


def in_double(module: nn.Module) -> nn.Module:
    """Turn a module into float64 in place, past `Scaling._apply`, which ignores casts."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.double() if buffer is not None else None
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.double()
    return module


def inv_freq(shape: Shape) -> Vector:
    return np.array([shape.theta ** (-2 * i / shape.rotary_dim) for i in range(_half(shape))])


def _half(shape: Shape) -> int:
    return shape.rotary_dim // 2


def critical_ntk(shape: Shape, t: float) -> Vector:
    """NTK that divides the dimension with one turn by t, and no slower one by more than that."""
    f = ntk(shape, 1.0)
    d = shape.rotary_dim
    slope = math.log(shape.native_length / (2 * math.pi)) / (math.log(shape.theta) * (d - 2) / d)
    return np.maximum(ntk(shape, t ** (1 / slope)), f / t)


def ntk(shape: Shape, alpha: float) -> Vector:
    """NTK-aware: base b * alpha**(d/(d-2))."""
    d = shape.rotary_dim
    base = shape.theta * alpha ** (d / (d - 2))
    return np.array([base ** (-2 * i / d) for i in range(_half(shape))])


def abf(shape: Shape, theta: float) -> Vector:
    """The curve of another base."""
    return inv_freq(Shape(shape.head_dim, theta, shape.partial))


def yarn(shape: Shape, t: float, *, reverse: bool = False) -> Vector:
    """YaRN with the ramp of transformers; `reverse` is the known wrong form."""
    d, length = shape.rotary_dim, shape.native_length

    def index_of(turns: float) -> float:
        return d * math.log(length / (2 * math.pi * turns)) / (2 * math.log(shape.theta))

    low, high = max(math.floor(index_of(32)), 0), min(math.ceil(index_of(1)), d - 1)
    width = (high - low) or 0.001
    result = []
    for i, f in enumerate(inv_freq(shape)):
        w = min(max((i - low) / width, 0.0), 1.0)
        w = 1 - w if reverse else w
        result.append((1 - w) * f + w * f / t)
    return np.array(result)


def llama3(shape: Shape, t: float, low: float = 1.0, high: float = 4.0) -> Vector:
    result = []
    for f in inv_freq(shape):
        wavelength = 2 * math.pi / f
        if wavelength < shape.native_length / high:
            result.append(f)
        elif wavelength > shape.native_length / low:
            result.append(f / t)
        else:
            g = (shape.native_length / wavelength - low) / (high - low)
            result.append((1 - g) * f / t + g * f)
    return np.array(result)


def log_n_factor(native_length: int, t: float) -> float:
    """a, with a**2 = ln(N) / ln(L) for N = t L keys."""
    return math.sqrt(math.log(t * native_length) / math.log(native_length))


def released_clex(
    shape: Shape, up: Vector, down: Vector, scales: Sequence[int], step: float = 0.01
) -> Vector:
    """The authors' released algorithm: log frequencies by fixed-step Runge-Kutta in t.

    dz/dt = W2^T tanh(W1^T (z + ell(t))) + xi(t) from z(1) = log f, by the 3/8 rule, which is what
    torchdiffeq calls rk4. `ell` has base 10,000 whatever the model's base is, as released.

    Args:
        shape: the model.
        up: W1, shape (F, hidden).
        down: W2, shape (hidden, F).
        scales: whole numbers t >= 1, rising.
        step: length of one step in t.

    Returns:
        Frequencies at `scales`, shape (len(scales), F).
    """
    d = shape.rotary_dim
    i2 = np.arange(0, d, 2, dtype=np.float64)

    def rate(t: float, z: Vector) -> Vector:
        ell = -i2 / d * math.log(10_000) - i2 / (d - 2) * math.log(2 * t - 1)
        xi = -i2 / (d - 2) * 2 / (2 * t - 1)
        return np.tanh((z + ell) @ up) @ down + xi

    z, t, result = np.log(inv_freq(shape)), 1.0, []
    for scale in scales:
        count = round((scale - t) / step)
        for k in range(count):
            s, h = t + k * step, step
            k1 = rate(s, z)
            k2 = rate(s + h / 3, z + h * k1 / 3)
            k3 = rate(s + 2 * h / 3, z + h * (k2 - k1 / 3))
            k4 = rate(s + h, z + h * (k1 - k2 + k3))
            z = z + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
        t = float(scale)
        result.append(np.exp(z))
    return np.array(result)
