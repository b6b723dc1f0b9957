"""Numbers under stress: any t, any weights, the largest scale, bfloat16, high rates."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.angles import angle_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

import clex
import tiny
from clex import training
from clex.config import ClexConfig
from clex.hf.extend import require_extension
from clex.positions import sample_positions
from clex.scaling import get_scaling
from clex.training import TrainConfig
from references import Shape, make_spec

FAST = settings(max_examples=40, deadline=None)
CLOSED = ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")

shapes = st.builds(
    Shape,
    head_dim=st.sampled_from([8, 32, 64, 128]),
    theta=st.floats(1e3, 1e7),
    native_length=st.integers(16, 32768),
    partial=st.sampled_from([1.0, 0.5]),
)
max_scales = st.floats(1.01, 4096)
shares = st.lists(st.floats(0, 1), min_size=2, max_size=6)


def scales(most: float, parts: list[float]) -> Tensor:
    """1, the largest scale, and some between, ascending."""
    t = 1 + (most - 1) * torch.tensor(sorted([0.0, 1.0, *parts]))
    return t.clamp(max=most)


def learned(shape: Shape, config: ClexConfig, std: float, seed: int) -> Any:
    """The learned method with random weights in all that begins at zero."""
    torch.manual_seed(seed)
    scaling = get_scaling("clex")(make_spec(shape), config)
    with torch.no_grad():
        for parameter in scaling.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return scaling


@FAST
@given(shapes, max_scales, st.sampled_from(CLOSED), shares)
def test_closed_forms(shape: Shape, most: float, method: str, parts: list[float]) -> None:
    spec = make_spec(shape)
    scaling = get_scaling(method)(spec, ClexConfig(method=method, max_scale=most))
    t = scales(most, parts)
    f, native = scaling.inv_freq(t), scaling.inv_freq_native
    assert f.isfinite().all()
    assert (f > 0).all()
    # No frequency is above the model's own, none rises with t, and their order stays.
    assert (f <= native * (1 + 1e-5)).all()
    assert (f.diff(dim=0) <= 1e-5 * f[:-1]).all()
    assert (f.diff(dim=1) <= 1e-5 * f[:, :-1]).all()
    assert torch.equal(f[0], native)
    factor = scaling.attention_factor(t)
    assert factor.isfinite().all()
    assert factor[0] == 1
    assert (factor.diff() >= -1e-6).all()


@FAST
@given(
    shapes,
    max_scales,
    shares,
    st.floats(0, 0.3),
    st.integers(0, 2**31),
    st.sampled_from(["dynamic_ntk", "yarn", "linear"]),
)
def test_learned_dynamics(
    shape: Shape, most: float, parts: list[float], std: float, seed: int, base: str
) -> None:
    """Weights up to thirty times those of trained fields (0.01)."""
    scaling = learned(shape, ClexConfig(max_scale=most, base=base), std, seed)
    t = scales(most, parts)
    with torch.no_grad():
        f, factor = scaling.inv_freq(t), scaling.attention_factor(t)
    assert f.isfinite().all()
    assert (f > 0).all()
    assert (f <= scaling.inv_freq_native * (1 + 1e-4)).all()
    assert torch.equal(f[0], scaling.inv_freq_native)
    assert factor.isfinite().all()
    assert factor[0] == 1
    assert (factor.diff() >= -1e-6).all()


@FAST
@given(shapes, st.floats(1.01, 64), st.floats(0, 0.02), st.integers(0, 2**31))
def test_the_released_field(shape: Shape, most: float, std: float, seed: int) -> None:
    """It promises less: its network may raise a frequency. Finite and positive it must be."""
    scaling = learned(shape, ClexConfig(preset="paper", max_scale=most), std, seed)
    with torch.no_grad():
        f = scaling.inv_freq(torch.tensor([1.0, most]))
    assert f.isfinite().all()
    assert (f > 0).all()
    assert torch.equal(f[0], scaling.inv_freq_native)


@FAST
@given(
    shapes,
    max_scales,
    st.sampled_from(["none", "integer", "quarter_octave"]),
    st.integers(0, 2**40),
)
def test_every_length_has_a_scale(shape: Shape, most: float, grid: str, length: int) -> None:
    """At least what the length asks for, on the grid, never above the largest."""
    config = ClexConfig(method="linear", max_scale=most, grid=grid)
    scaling = get_scaling("linear")(make_spec(shape), config)
    t = scaling.scale_for(torch.tensor([length, length + 1])).double()
    wanted = min(max(length / shape.native_length, 1.0), most)
    assert wanted * (1 - 1e-4) <= t[0] <= most * (1 + 1e-6)
    assert t[0] <= t[1]
    if length <= shape.native_length:
        assert t[0] == 1
    steps = {"none": 1.0, "integer": 1 + 1 / wanted, "quarter_octave": 2**0.25}
    assert t[0] <= wanted * steps[grid] * (1 + 1e-4)


def test_beyond_the_largest_scale() -> None:
    """One warning for a model, and the numbers of the largest scale."""
    model = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=2, steps=4))
    longer = tiny.make_ids(1, 2 * tiny.NATIVE + 5)
    with pytest.warns(UserWarning, match="133 tokens are more than the 128 that max_scale 2"):
        beyond = tiny.logits(model, longer)
    assert beyond.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.logits(model, longer)
        model.generate(longer, max_new_tokens=1)
        with clex.at_scale(model, 2):
            assert torch.equal(tiny.logits(model, longer), beyond)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=2, steps=4))
        tiny.logits(fresh, longer[:, :128])  # just covered


def test_the_warning_never_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by the shapes: no number of a tensor is read in a pass without a cache."""
    model = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=2, steps=4))
    rope, ids = require_extension(model), tiny.make_ids(2, 200)
    seen: list[int] = []
    monkeypatch.setattr(type(rope), "warn_beyond", lambda self, tokens: seen.append(tokens))
    for name in ("item", "tolist", "__int__", "__float__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *_, **__: pytest.fail("a number was read from a tensor")
        )
    clex.hf.forward_pass._warn_beyond(rope, {"attention_mask": torch.ones(2, 200)}, 3)
    clex.hf.forward_pass._warn_beyond(rope, {"input_ids": ids}, ids.shape[1])
    assert seen == [200, 200]


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_at_the_largest_scale(preset: str, dtype: torch.dtype) -> None:
    """4,096 times the native window, where every number is at its extreme."""
    most = 4096.0 if preset == "default" else 64.0
    model = clex.extend(
        tiny.make_model(dtype=dtype), clex.ClexConfig(preset=preset, max_scale=most)
    ).train()
    tiny.stir(model, std=0.02)
    ids = tiny.make_ids(1, 100)
    positions = torch.linspace(0, most * tiny.NATIVE - 1, 100)[None].floor()
    with clex.at_scale(model, most, positions):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("scalings" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    learned_parts = [g for n, g in gradients.items() if "scalings" in n]
    assert any(gradient.any() for gradient in learned_parts)


@pytest.mark.parametrize("depth", ["dynamics", "full"])
def test_training_at_ten_times_the_rate(tmp_path: Path, depth: str) -> None:
    """bfloat16, 30 steps; a thousand by hand: `python -m benchmarks.stress`."""
    plain = TrainConfig(depth=depth)
    config = TrainConfig(
        depth=depth,
        steps=30,
        rate=10 * plain.rate,
        dynamics_rate=10 * (plain.dynamics_rate or 2e-4),
        precision="bf16",
        save_every=30,
    )
    model = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=4, steps=4))
    trained = training.train(
        model, tiny.make_tokens([300, 280]), config, tmp_path, console=Console(file=io.StringIO())
    )
    for name, parameter in trained.named_parameters():
        assert parameter.isfinite().all(), name
    for t in (1.0, 2.0, 4.0):
        found = clex.frequencies(trained, t)
        assert isinstance(found, Tensor)
        assert found.isfinite().all()
        assert (found > 0).all()


@pytest.mark.parametrize("t", [1.0, 8.0, 512.0])
def test_angles(t: float) -> None:
    """float32 angles against float64 ones, up to two million positions."""
    for positions, error, rounding, allowed in angle_errors(theta=10_000.0, head_dim=128, t=t):
        assert rounding <= error <= allowed, positions
        assert error > allowed / 8  # the bound says something
        assert error < 0.2


@FAST
@given(
    st.sampled_from(["contiguous", "random", "uniform", "chunks", "chunks:0.7,random:0.3"]),
    st.integers(3, 300),
    st.floats(1, 64),
    st.integers(0, 2**62),
)
def test_positions(sampler: str, n: int, t: float, seed: int) -> None:
    """They rise strictly and stay inside the span of their scale, or of the window itself."""
    native = 64
    found = sample_positions(sampler, n, torch.tensor([t]), torch.tensor([seed]), native, 64.0)
    assert found.shape == (1, n)
    assert found[0, 0] >= 0
    assert (found.diff() > 0).all()
    assert found[0, -1] <= max(n - 1, t * native + 1)
    again = sample_positions(sampler, n, torch.tensor([t]), torch.tensor([seed]), native, 64.0)
    assert torch.equal(found, again)


@FAST
@given(
    st.fixed_dictionaries(
        {
            "preset": st.sampled_from(["default", "paper"]),
            "max_scale": st.floats(1, 4096),
            "grid": st.sampled_from(["none", "integer", "quarter_octave"]),
            "temperature": st.sampled_from(["none", "log_n", "yarn", "learned"]),
            "steps": st.integers(1, 4096),
            "width": st.floats(0.01, 16),
            "bound": st.floats(0, 8),
            "post": st.lists(st.sampled_from(["clip", "resonance", "p_rope"]), max_size=3),
        }
    )
)
def test_configs_survive_a_file(values: dict[str, Any]) -> None:
    config = ClexConfig.from_dict(values)
    assert ClexConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert all(getattr(config, k) == (tuple(v) if k == "post" else v) for k, v in values.items())
