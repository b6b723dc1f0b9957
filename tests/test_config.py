"""The configuration: presets, checks, and the round trip through JSON."""

import json
from typing import Any

import pytest

from clex.config import ClexConfig
from clex.errors import ClexError, ConfigError


def test_default_preset() -> None:
    config = ClexConfig()
    assert (config.method, config.field, config.base) == ("clex", "modulated", "critical_ntk")
    assert (config.grid, config.positions, config.temperature) == (
        "quarter_octave",
        "chunks",
        "learned",
    )
    assert config.temperature_in_training and not config.integer_scales


def test_paper_preset() -> None:
    config = ClexConfig(preset="paper")
    assert (config.field, config.base, config.activation) == ("released", "dynamic_ntk", "tanh")
    assert (config.grid, config.positions, config.temperature) == ("integer", "random", "log_n")
    assert config.integer_scales and not config.temperature_in_training


def test_a_given_value_goes_before_the_preset() -> None:
    assert ClexConfig(preset="paper", bound=0.5, grid="none").bound == 0.5
    # False and 0 are values as well, not gaps to be filled.
    assert ClexConfig(temperature_in_training=False).temperature_in_training is False
    assert ClexConfig(bound=0.0).bound == 0.0


@pytest.mark.parametrize(
    ("values", "named", "hint"),
    [
        ({"preset": "papr"}, "papr", "'paper'"),
        ({"grid": "intger"}, "intger", "'integer'"),
        ({"activation": "tanhh"}, "tanhh", "'tanh'"),
        ({"solver": "rk45"}, "rk45", "'rk4'"),
        ({"max_scal": 4.0}, "max_scal", "'max_scale'"),
    ],
)
def test_unknown_values_name_their_neighbours(
    values: dict[str, Any], named: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ClexConfig.from_dict(values)
    message = str(caught.value)
    assert named in message and f"did you mean {hint}" in message and "\n" not in message
    assert isinstance(caught.value, ClexError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "values",
    [
        {"max_scale": 0.5},
        {"max_scale": 1e9},
        {"max_scale": float("nan")},
        {"max_scale": float("inf")},
        {"max_scale": "4"},
        {"max_scale": True},
        {"native_length": 1},
        {"native_length": 2048.5},
        {"width": 0.0},
        {"bound": -1.0},
        {"steps": 0},
        {"steps": 2.5},
        {"options": [1]},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ClexConfig(**values)


@pytest.mark.parametrize(
    "config",
    [
        ClexConfig(),
        ClexConfig(preset="paper", max_scale=4.0, native_length=4096, options={"factor": 3.0}),
        ClexConfig(method="yarn", layer_types=("full_attention",), options={"beta_fast": 16.0}),
        ClexConfig(method="longrope", options={"long_factor": {"4": [1.0, 4.0]}}),
    ],
    ids=lambda config: f"{config.method}-{config.preset}",
)
def test_round_trip(config: ClexConfig) -> None:
    assert ClexConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config != config.replace(max_scale=5.0)


@pytest.mark.parametrize(
    "setting",
    [
        {"field": "modulated"},
        {"base": "yarn"},
        {"width": 1.0},
        {"activation": "silu"},
        {"bound": 0.0},
        {"solver": "rk4"},
        {"steps": 8},
    ],
    ids=str,
)
def test_settings_of_the_dynamics_need_the_learned_method(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} belongs to method 'clex'"):
        ClexConfig(method="yarn", **setting)
    assert ClexConfig(method="clex", **setting).to_dict().items() >= setting.items()


def test_a_temperature_suits_every_method() -> None:
    assert ClexConfig(method="yarn").temperature is None
    assert ClexConfig(method="yarn", temperature="log_n").temperature == "log_n"


def test_config_is_immutable_and_replace_checks() -> None:
    config = ClexConfig()
    with pytest.raises(AttributeError):
        config.max_scale = 3.0  # type: ignore[misc]
    assert config.replace(max_scale=3.0).max_scale == 3.0
    with pytest.raises(ConfigError, match="max_scale"):
        config.replace(max_scale=0.0)
