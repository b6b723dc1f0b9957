"""The temperature of attention as a function of t."""

import math

import pytest
import torch

from clex.errors import ConfigError
from clex.temperature import TEMPERATURES, make_temperature
from references import assert_close, log_n_factor

SCALES = torch.tensor([1.0, 1.25, 2.0, 4.0, 8.0, 16.0, 64.0])
LENGTH = 4096


@pytest.mark.parametrize("name", TEMPERATURES)
def test_one_at_one_and_never_below(name: str) -> None:
    factor = make_temperature(name, LENGTH)(SCALES)
    assert factor.shape == SCALES.shape and factor.dtype == torch.float32
    assert factor[0] == 1.0
    assert (factor >= 1).all() and (factor.diff() >= 0).all(), factor


@pytest.mark.parametrize("length", [2, 128, 4096, 131072])
def test_log_n(length: int) -> None:
    factor = make_temperature("log_n", length)(SCALES)
    # float32 rounding of a log, a division and a root.
    assert_close(factor, [log_n_factor(length, float(t)) for t in SCALES], 5e-7)
    # The released code has ln(kv) / ln(L) below the window as well, which is less than one.
    assert log_n_factor(4096, 0.5) < 1


def test_yarn() -> None:
    factor = make_temperature("yarn", LENGTH)(SCALES)
    assert_close(factor, [0.1 * math.log(float(t)) + 1 for t in SCALES], 5e-7)


def test_none() -> None:
    assert torch.equal(make_temperature("none", LENGTH)(SCALES), torch.ones_like(SCALES))


def test_learned_starts_as_log_n() -> None:
    learned, log_n = make_temperature("learned", LENGTH), make_temperature("log_n", LENGTH)
    # The same number by log1p and exp in place of a root: float32 rounding.
    assert_close(learned(SCALES), log_n(SCALES).double().numpy(), 1e-6)


def test_learned_never_falls_for_random_parameters() -> None:
    t = torch.logspace(0, 6, 200, base=2.0)
    start = make_temperature("log_n", LENGTH)(t)
    for _ in range(50):
        temperature = make_temperature("learned", LENGTH)
        with torch.no_grad():
            for parameter in temperature.parameters():
                parameter.normal_()
            factor = temperature(t)
        assert factor[0] == 1.0
        # Neighbours of equal value may differ by one rounding.
        assert (factor.diff() >= -2e-7 * factor[1:]).all(), factor.diff().min()
        assert not torch.allclose(factor, start, rtol=1e-4), "parameters have no effect"


def test_learned_has_gradients() -> None:
    temperature = make_temperature("learned", LENGTH)
    temperature(SCALES).sum().backward()
    assert all(p.grad is not None and p.grad != 0 for p in temperature.parameters())


def test_unknown_rule() -> None:
    with pytest.raises(ConfigError, match="did you mean 'log_n'"):
        make_temperature("logn", LENGTH)


def test_learned_grows_as_log_n_beyond_what_it_is_fitted_for() -> None:
    free = make_temperature("learned", LENGTH, layers=3)
    held = make_temperature("learned", LENGTH, layers=3, fitted_scale=4.0)
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.normal_(std=0.3)
        held.load_state_dict(free.state_dict())
        t = SCALES[:, None]
        factors, others = held.layer_factors(t), free.layer_factors(t)
    inside = SCALES <= 4
    assert torch.equal(factors[inside], others[inside])
    edge = others[SCALES == 4].double().numpy()
    for row, scale in zip(factors[~inside], SCALES[~inside], strict=True):
        grown = log_n_factor(LENGTH, float(scale)) / log_n_factor(LENGTH, 4)
        assert_close(row, edge[0] * grown, 1e-6)
    assert not torch.allclose(factors[~inside], others[~inside], rtol=1e-3)
