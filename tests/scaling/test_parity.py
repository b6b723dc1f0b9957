"""Frequencies and attention factors against transformers, and against slow references."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import references
from clex.config import ClexConfig
from clex.rope import RopeSpec
from clex.scaling import get_scaling
from references import Shape, Vector, assert_close

# Both sides are float32 powers and products of numbers that carry a rounding of 6e-8 each; a log
# of up to ln(1e6) turns it into some 1e-6 of the frequency.
TOLERANCE = 2e-6

SCALES = (1.5, 4.0, 16.0)


def ours(
    method: str, spec: RopeSpec, t: float, options: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    config = ClexConfig(method=method, options=options or {}, max_scale=64.0)
    scaling = get_scaling(method)(spec, config).eval()
    scale = torch.tensor([t])
    return scaling.inv_freq(scale)[0], scaling.attention_factor(scale)[0]


def theirs(
    rope_type: str, shape: Shape, seq_len: int | None = None, **parameters: Any
) -> tuple[Tensor, float]:
    config = LlamaConfig(
        hidden_size=2 * shape.head_dim,
        num_attention_heads=2,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.native_length,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": shape.theta,
            "partial_rotary_factor": shape.partial,
            "original_max_position_embeddings": shape.native_length,
            **parameters,
        },
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len)
    return inv_freq, float(factor)


def long_factors(shape: Shape, t: float) -> list[float]:
    """A plausible list: ones at first, then rising to t, with some noise as a search leaves it."""
    half = shape.rotary_dim // 2
    shares = np.clip(np.linspace(-0.5, 1.2, half), 0, 1)
    return [float(t**share * (1 + 0.05 * math.sin(7 * i))) for i, share in enumerate(shares)]


def compare(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, float]) -> None:
    assert_close(actual[0], expected[0].double().numpy(), TOLERANCE)
    # One log and one root in float32.
    assert_close(actual[1], expected[1], 5e-7)


@pytest.mark.parametrize("t", SCALES)
def test_linear(shape: Shape, spec: RopeSpec, t: float) -> None:
    compare(ours("linear", spec, t), theirs("linear", shape, factor=t))


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("t", SCALES)
def test_dynamic_ntk(shape: Shape, spec: RopeSpec, t: float, factor: float) -> None:
    length = round(t * shape.native_length)
    expected = theirs("dynamic", shape, seq_len=length, factor=factor)
    compare(ours("dynamic_ntk", spec, t, {"factor": factor}), expected)


@pytest.mark.parametrize("exponent", [0.7, 1.5])
@pytest.mark.parametrize("t", SCALES)
def test_critical_ntk_with_an_exponent(
    shape: Shape, spec: RopeSpec, t: float, exponent: float
) -> None:
    """NTK at alpha = t**exponent, by transformers' formula, but no lower than f / t."""
    ntk, f = (references.ntk(shape, alpha) for alpha in (t**exponent, 1.0))
    found = ours("critical_ntk", spec, t, {"exponent": exponent})[0].double().numpy()
    assert_close(found, np.maximum(ntk, f / t), TOLERANCE)


@pytest.mark.parametrize("turns", [0.5, 1.0, 3.0])
def test_critical_ntk(spec: RopeSpec, turns: float) -> None:
    """Dimensions with fewer turns meet no new angle; the next faster one does, at every t."""
    slow = spec.turns() < turns
    assert slow.any() and not slow.all()
    for t in [t for t in SCALES if t > 1]:
        scaled = ours("critical_ntk", spec, t, {"turns": turns})[0]
        farthest = t * scaled / spec.inv_freq
        assert (farthest[slow] - 1).abs().max() < 1e-5, "divided by t, neither more nor less"
        assert (farthest[~slow] > 1 + 1e-4).all(), "faster ones less"
        assert scaled[0] == spec.inv_freq[0], "and the fastest not at all"


def test_critical_ntk_where_nothing_is_critical(spec: RopeSpec) -> None:
    """Every dimension turns: the slowest alone is divided by t, as in NTK with alpha = t."""
    long = dataclasses.replace(spec, native_length=2**40)
    for t in SCALES:
        found = ours("critical_ntk", long, t)[0]
        assert_close(found, ours("ntk", long, t, {"factor": t})[0].double().numpy(), 1e-6)
    # A window in which no dimension turns: all but the fastest as in PI.
    short = dataclasses.replace(spec, native_length=1)
    found = ours("critical_ntk", short, 4.0)[0] / spec.inv_freq
    assert found[0] == 1 and (found[1:] * 4 - 1).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"truncate": False}, {"beta_fast": 8.0, "beta_slow": 2.0}])
@pytest.mark.parametrize("t", SCALES)
def test_yarn(shape: Shape, spec: RopeSpec, t: float, options: dict[str, Any]) -> None:
    compare(ours("yarn", spec, t, options), theirs("yarn", shape, factor=t, **options))


@pytest.mark.parametrize("factors", [(1.0, 4.0), (2.0, 16.0)])
@pytest.mark.parametrize("t", SCALES)
def test_llama3(shape: Shape, spec: RopeSpec, t: float, factors: tuple[float, float]) -> None:
    options = {"low_freq_factor": factors[0], "high_freq_factor": factors[1]}
    compare(ours("llama3", spec, t, options), theirs("llama3", shape, factor=t, **options))


@pytest.mark.parametrize("as_mapping", [True, False])
@pytest.mark.parametrize("t", SCALES)
def test_longrope(shape: Shape, spec: RopeSpec, t: float, as_mapping: bool) -> None:
    factors = long_factors(shape, t)
    given = {str(t): factors, "32": long_factors(shape, 32)} if as_mapping else factors
    expected = theirs(
        "longrope",
        shape,
        seq_len=round(t * shape.native_length),
        factor=t,
        long_factor=factors,
        short_factor=[1.0] * len(factors),
    )
    compare(ours("longrope", spec, t, {"long_factor": given}), expected)


def test_longrope_between_and_beyond_known_scales(shape: Shape, spec: RopeSpec) -> None:
    two, eight = long_factors(shape, 2), long_factors(shape, 8)
    options = {"long_factor": {"8": eight, "2": two}}
    f = references.inv_freq(shape)
    expected = {
        math.sqrt(2): f / np.sqrt(two),
        4.0: f / np.sqrt(np.multiply(two, eight)),
        64.0: f / np.square(eight),
    }
    for t, vector in expected.items():
        assert_close(ours("longrope", spec, t, options)[0], vector, TOLERANCE)


@pytest.mark.parametrize("t", SCALES)
def test_references(shape: Shape, spec: RopeSpec, t: float) -> None:
    """The same curves against references that share no code with either library."""
    expected: dict[tuple[str, float | None], Vector] = {
        ("ntk", 5.0): references.ntk(shape, 5.0),
        ("ntk", None): references.ntk(shape, 64.0),
        ("dynamic_ntk", None): references.ntk(shape, 2 * t - 1),
        ("critical_ntk", None): references.critical_ntk(shape, t),
        ("yarn", None): references.yarn(shape, t),
        ("llama3", None): references.llama3(shape, t),
    }
    for (method, factor), vector in expected.items():
        options = {} if factor is None else {"factor": factor}
        assert_close(ours(method, spec, t, options)[0], vector, TOLERANCE)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_abf_is_the_curve_of_the_new_base(shape: Shape, spec: RopeSpec, t: float) -> None:
    result, factor = ours("abf", spec, t, {"rope_theta": 5e6})
    assert_close(result, references.abf(shape, 5e6), TOLERANCE)
    assert factor == 1


def test_abf_with_dimensions_that_do_not_rotate() -> None:
    shape = Shape(head_dim=64, theta=1e4)
    inv_freq = references.make_spec(shape).inv_freq.clone()
    inv_freq[12:] = 0
    result, _ = ours("abf", RopeSpec(inv_freq, 2048, 1e4), 4.0, {"rope_theta": 5e6})
    assert_close(result[:12], references.abf(shape, 5e6)[:12], TOLERANCE)


def test_a_ramp_the_wrong_way_round_is_seen(shape: Shape, spec: RopeSpec) -> None:
    """At least one widely used training code base divides the fast dimensions."""
    t = 4.0
    wrong = references.yarn(shape, t, reverse=True)
    with pytest.raises(AssertionError, match="largest relative difference"):
        assert_close(ours("yarn", spec, t)[0], wrong, TOLERANCE)
    for method in ("yarn", "llama3", "dynamic_ntk", "ntk"):
        ratio = ours(method, spec, t)[0] / spec.inv_freq
        assert ratio[0] == 1, f"{method}: fastest dimension scaled by {ratio[0]}"
        assert ratio[-1] < 0.3, f"{method}: slowest dimension scaled by {ratio[-1]}"


def test_yarn_on_a_bent_curve_follows_the_turns() -> None:
    shape = Shape(head_dim=64, theta=1e4)
    spec = references.make_spec(shape)
    bent = RopeSpec(torch.from_numpy(references.llama3(shape, 8.0)).float(), 2048, 1e4)
    f = bent.inv_freq.double().numpy()
    turns = 2048 * f / (2 * math.pi)
    w = np.clip(np.log(32 / turns) / np.log(32), 0, 1)
    assert_close(ours("yarn", bent, 4.0)[0], (1 - w) * f + w * f / 4, TOLERANCE)
    # On a geometric curve that is the untruncated ramp of transformers.
    geometric = ours("yarn", spec, 4.0, {"truncate": False})[0]
    slightly_bent = RopeSpec(spec.inv_freq * 1.0001, 2048, 1e4)
    assert_close(ours("yarn", slightly_bent, 4.0)[0], geometric.double().numpy(), 3e-4)


@pytest.mark.parametrize("method", ["dynamic_ntk", "ntk"])
def test_a_model_that_was_interpolated_before_keeps_its_fastest_dimension(method: str) -> None:
    """The slope is that of the model's own vector, which need not start at 1."""
    spec = references.make_spec(Shape(head_dim=64, theta=1e4))
    result, _ = ours(method, RopeSpec(spec.inv_freq / 4, 2048, 1e4), 4.0, {"factor": 3.0})
    alpha = 3.0 if method == "ntk" else 3.0 * 4.0 - 2.0
    expected = references.ntk(Shape(head_dim=64, theta=1e4), alpha) / 4
    assert_close(result, expected, TOLERANCE)
