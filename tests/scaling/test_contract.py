"""What every scaling method promises. A new file in `clex.scaling` is tested without an edit."""

import json
from typing import Any

import pytest
import torch

from clex.config import PRESETS, ClexConfig
from clex.errors import ConfigError
from clex.rope import RopeSpec
from clex.scaling import Scaling, get_scaling, register_scaling, scaling_methods
from clex.scaling.base import parse_options
from references import Shape, assert_close, assert_same_bits, in_double, make_spec

SHAPE = Shape(head_dim=64, theta=1e4, native_length=2048)
SCALES = torch.tensor([1.0, 1.3, 2.0, 4.0, 7.7, 16.0])

# Options of methods that have no defaults, for a model with 32 frequencies.
OPTIONS: dict[str, dict[str, Any]] = {
    "longrope": {
        "long_factor": {
            "2": [2 ** (i / 31) for i in range(32)],
            "8": [8 ** (i / 31) ** 2 for i in range(32)],
        }
    }
}

CASES = [
    (method, preset)
    for method in scaling_methods()
    for preset in (PRESETS if method == "clex" else PRESETS[:1])
]


def make(case: tuple[str, str], spec: RopeSpec | None = None, **settings: Any) -> Scaling:
    """A scaling, with random weights where it has some, so that learned parts have an effect."""
    method, preset = case
    settings.setdefault("options", OPTIONS.get(method, {}))
    config = ClexConfig(method=method, preset=preset, **settings)
    scaling = get_scaling(method)(spec or make_spec(SHAPE), config).eval()
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.normal_(std=0.02)
    return scaling


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_shape_dtype_and_range(case: tuple[str, str]) -> None:
    scaling = make(case)
    result = scaling.inv_freq(SCALES)
    assert result.shape == (6, 32) and result.dtype == torch.float32
    assert result.isfinite().all()
    assert (result > 0).all() if scaling.rotates else (result == 0).all()
    assert scaling.source, "say where the formula comes from"


def test_exact_at_one(case: tuple[str, str]) -> None:
    scaling = make(case)
    result = scaling.inv_freq(SCALES)[0]
    if scaling.exact_at_one:
        assert_same_bits(result, make_spec(SHAPE).inv_freq)
    else:
        assert not torch.equal(result, make_spec(SHAPE).inv_freq), "then exact_at_one is true"


def test_batch_equals_one_by_one(case: tuple[str, str]) -> None:
    scaling = make(case)
    alone = torch.cat([scaling.inv_freq(t[None]) for t in SCALES])
    # Matrix products of another height may sum in another order.
    assert_close(scaling.inv_freq(SCALES), alone.detach().double().numpy(), 1e-6)


def test_the_fastest_dimension_is_scaled_no_more_than_the_slowest(case: tuple[str, str]) -> None:
    """Catches a reversed ramp."""
    scaling = make(case)
    ratio = scaling.inv_freq(SCALES) / make_spec(SHAPE).inv_freq
    worst = (ratio[:, 0] - ratio[:, -1]).min()
    assert worst >= -1e-6, f"fastest scaled more than slowest by {-worst}"


def test_config_round_trip(case: tuple[str, str]) -> None:
    scaling = make(case)
    text = json.dumps(scaling.config.replace(options=OPTIONS.get(case[0], {})).to_dict())
    again = get_scaling(case[0])(make_spec(SHAPE), ClexConfig.from_dict(json.loads(text))).eval()
    again.load_state_dict(scaling.state_dict())
    assert_same_bits(again.inv_freq(SCALES), scaling.inv_freq(SCALES))


def test_casts_are_ignored(case: tuple[str, str]) -> None:
    scaling = make(case)
    before = scaling.inv_freq(SCALES).detach()
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        scaling.to(cast)
    assert_same_bits(scaling.inv_freq(SCALES), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(scaling.inv_freq(SCALES), before)
    # The negative: bfloat16 would be seen.
    assert torch.equal(before.bfloat16().float(), before) == (not scaling.rotates)


def test_on_differs_from_off(case: tuple[str, str]) -> None:
    changed = make(case).inv_freq(torch.tensor([4.0]))[0]
    assert torch.equal(changed, make_spec(SHAPE).inv_freq) == (case[0] == "none")


def test_dimensions_that_do_not_rotate(case: tuple[str, str]) -> None:
    inv_freq = make_spec(SHAPE).inv_freq.clone()
    inv_freq[20:] = 0
    scaling = make(case, RopeSpec(inv_freq, 2048, 1e4))
    result = scaling.inv_freq(SCALES)
    assert result.isfinite().all() and (result[:, 20:] == 0).all()
    assert ((result[:, :20] > 0) == scaling.rotates).all()


def test_temperature(case: tuple[str, str]) -> None:
    factor = make(case).attention_factor(SCALES)
    assert factor.shape == SCALES.shape and factor.dtype == torch.float32
    assert factor[0] == 1 and (factor >= 1).all() and factor.isfinite().all()


def test_temperature_in_training_is_a_setting(case: tuple[str, str]) -> None:
    for acts in (True, False):
        scaling = make(case, temperature="log_n", temperature_in_training=acts)
        assert (scaling.train().attention_factor(SCALES)[1:] > 1).all() == acts
        assert (scaling.eval().attention_factor(SCALES)[1:] > 1).all()


def test_rate_is_the_derivative(case: tuple[str, str]) -> None:
    scaling: Any = in_double(make(case))
    try:
        scaling.rate(torch.ones(1, dtype=torch.float64))
    except ConfigError as error:
        assert case[0] in str(error) and "cannot be the base" in str(error)
        return
    check_rate(scaling)


def check_rate(scaling: Any) -> None:
    # Away from the given scales of longrope, where its curve has corners.
    t = torch.tensor([1.2, 1.7, 3.3, 6.1, 13.0], dtype=torch.float64)
    rate, h = scaling.rate(t), 1e-5
    difference = (scaling.ratio(t * (1 - h)).log() - scaling.ratio(t * (1 + h)).log()) / (2 * h)
    # Central difference in log t: h**2 and rounding 1e-16 / h.
    worst = (rate.expand_as(difference) - difference).abs()
    assert worst.max() < 1e-8, f"{worst.max()} at {divmod(int(worst.argmax()), 32)}"


def test_learned_parts_have_gradients_at_one(case: tuple[str, str]) -> None:
    scaling = make(case).train()
    parameters = dict(scaling.named_parameters())
    if not parameters:
        assert not scaling.inv_freq(SCALES).requires_grad
        return
    one = torch.ones(2)
    (scaling.inv_freq(one).sum() + scaling.attention_factor(one).sum()).backward()
    learned = {k: p for k, p in parameters.items() if p.grad is not None}
    assert any(k.startswith("field") for k in learned), "missing gradients hang sharded training"
    assert all((p.grad == 0).all() for p in learned.values()), "zero at t = 1, and not NaN"
    scaling.zero_grad()
    scaling.inv_freq(torch.tensor([1.0, 4.0])).sum().backward()
    for name, parameter in parameters.items():
        if name.startswith("field"):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).any(), name


def test_lengths_round_up_to_scales(case: tuple[str, str]) -> None:
    lengths = torch.tensor([1, 2048, 2049, 4096, 5000, 2048 * 99])
    exact = (lengths.double() / 2048).clamp(1, 16)
    for grid, most in (("none", 1e-6), ("integer", 1.0), ("quarter_octave", 4.0)):
        t = make(case, grid=grid).scale_for(lengths)
        assert t[0] == t[1] == 1 and t[-1] == 16
        assert (t >= exact * (1 - 1e-4)).all() and (t - exact <= most).all(), (grid, t)


def test_unknown_options_and_methods() -> None:
    with pytest.raises(ConfigError, match="did you mean 'yarn'"):
        get_scaling("yarm")
    with pytest.raises(ConfigError, match="did you mean 'beta_fast'"):
        make(("yarn", "default"), options={"beta_fats": 3})
    with pytest.raises(ConfigError, match="has no options"):
        make(("linear", "default"), options={"factor": 3})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("yarn", {"beta_fast": 1.0, "beta_slow": 32.0}),
        ("dynamic_ntk", {"factor": 0.5}),
        ("dynamic_ntk", {"factor": "two"}),
        ("critical_ntk", {"turns": 0.0}),
        ("critical_ntk", {"turns": "two"}),
        ("critical_ntk", {"exponent": -1.0}),
        ("critical_ntk", {"exponent": 1.5, "turns": 2.0}),
        ("ntk", {"factor": 0.0}),
        ("ntk", {"factor": float("nan")}),
        ("abf", {"rope_theta": 1e4}),
        ("abf", {"rope_theta": float("inf")}),
        ("llama3", {"low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        ("llama3", {"low_freq_factor": 0.0}),
        ("longrope", {}),
        ("longrope", {"long_factor": {}}),
        ("longrope", {"long_factor": [1.0] * 31}),
        ("longrope", {"long_factor": [0.0] * 32}),
        ("longrope", {"long_factor": ["a"] * 32}),
        ("longrope", {"long_factor": "1"}),
        ("longrope", {"long_factor": {"1": [1.0] * 32}}),
        ("longrope", {"long_factor": {"many": [1.0] * 32}}),
    ],
    ids=str,
)
def test_bad_options(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=method):
        make((method, "default"), options=options)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="already Linear"):

        @register_scaling("linear")
        class Other(Scaling):
            pass

    assert parse_options("yarn", get_scaling("yarn").Options, {}).beta_fast == 32
