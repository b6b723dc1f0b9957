"""Factors against float64 numpy and against the frequencies that transformers makes."""

from __future__ import annotations

import math
from typing import Any

import exports
import numpy as np
import pytest
import torch

import clex
import tiny
from clex.errors import ConfigError, UnsupportedModelError
from clex.export.factors import plain_inv_freq, rope_factors
from clex.export.fixed import FixedScale, fixed_scale


def held(t: float = 4.0, **changes: Any) -> FixedScale:
    return fixed_scale(clex.extend(exports.make_model(**changes), exports.YARN), scale=t)


def test_the_plain_curve_is_that_of_transformers_bit_for_bit() -> None:
    model = tiny.make_model()
    own = model.model.rotary_emb.inv_freq
    # The reference rounds at each step; float64 rounded once is within one step of float32.
    assert torch.allclose(plain_inv_freq(10_000.0, 2 * len(own)).float(), own, rtol=2e-7, atol=0)
    numpy = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    assert np.allclose(plain_inv_freq(10_000.0, 16).numpy(), numpy, rtol=1e-15, atol=0)


def test_engines_make_the_wanted_frequencies_of_the_factors() -> None:
    wanted = plain_inv_freq(500.0, 32) / torch.linspace(1, 7, 16, dtype=torch.float64)
    factors = rope_factors(wanted=wanted, rope_theta=500.0, rotary_dim=32)
    plain = 500.0 ** -(np.arange(0, 32, 2) / 32)
    assert np.allclose(plain / factors.numpy(), wanted.numpy(), rtol=1e-12, atol=0)
    after_float32 = plain / factors.float().double().numpy()
    assert np.allclose(after_float32, wanted.numpy(), rtol=2e-7, atol=0)


def test_slower_frequencies_have_factors_above_one() -> None:
    factors = held().factors
    assert (factors >= 1 - 1e-6).all()
    assert math.isclose(float(factors[-1]), 4.0, rel_tol=1e-5)


def test_a_vector_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="valid: 16"):
        rope_factors(wanted=torch.ones(15), rope_theta=1e4, rotary_dim=32)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_frequencies_without_a_factor_are_refused(bad: float) -> None:
    wanted = torch.ones(16)
    wanted[3] = bad
    with pytest.raises(UnsupportedModelError, match="zero or not finite"):
        rope_factors(wanted=wanted, rope_theta=1e4, rotary_dim=32)


def test_temperature_is_the_square_of_the_factor_on_cos_and_sin() -> None:
    assert math.isclose(held().temperature, (0.1 * math.log(4) + 1) ** 2, rel_tol=1e-6)
    assert held().native_temperature == 1


def test_length_and_scale_say_the_same() -> None:
    model = clex.extend(exports.make_model(), exports.YARN)
    by_length = fixed_scale(model, length=256)
    assert (by_length.t, by_length.length) == (4.0, 256)
    assert torch.equal(by_length.factors, held(4.0).factors)
    assert held(2.5).length == 160


@pytest.mark.parametrize("given", [{}, {"scale": 2, "length": 128}])
def test_scale_or_length_must_be_given(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not both"):
        fixed_scale(clex.extend(exports.make_model(), exports.YARN), **given)


@pytest.mark.parametrize("given", [{"scale": 1}, {"scale": 9}, {"length": 64}, {"length": 600}])
def test_scales_outside_the_extension_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be exported"):
        fixed_scale(clex.extend(exports.make_model(), exports.YARN), **given)


def test_another_theta_than_that_of_the_frequencies_is_refused() -> None:
    model = exports.make_model()
    model.model.rotary_emb.inv_freq.mul_(0.9)
    with pytest.raises(UnsupportedModelError, match="not those of its rope_theta"):
        fixed_scale(clex.extend(model, exports.YARN), scale=4)


@pytest.mark.parametrize("kind", ["temperature", "curve"])
def test_layers_with_numbers_of_their_own_are_refused(kind: str) -> None:
    own = clex.ClexConfig(max_scale=8, per_layer=kind)
    with pytest.raises(UnsupportedModelError, match="fit the dynamics with --per-layer none"):
        fixed_scale(clex.extend(exports.make_model(), own), scale=4)


def test_alibi_has_no_factors() -> None:
    alibi = clex.ClexConfig(method="alibi", max_scale=8)
    with pytest.raises(UnsupportedModelError, match="does not rotate"):
        fixed_scale(clex.extend(exports.make_model(), alibi), scale=4)


def test_zero_frequencies_are_refused() -> None:
    config = clex.ClexConfig(method="yarn", max_scale=8, post=("p_rope",))
    model = clex.extend(exports.make_model(), config)
    with pytest.raises(UnsupportedModelError, match="zero"):
        fixed_scale(model, scale=4)
