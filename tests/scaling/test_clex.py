"""The learned method: its closed-form twin, the released algorithm, the solver's accuracy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import references
from clex.config import ClexConfig
from clex.errors import ConfigError
from clex.rope import RopeSpec
from clex.scaling import get_scaling
from references import Shape, assert_close, assert_same_bits, in_double, make_spec

MANY_SCALES = torch.cat([torch.linspace(1.0, 16.0, 31), torch.tensor([1.0001, 63.0])])


def clex(spec: RopeSpec, **settings: Any) -> Any:
    settings.setdefault("max_scale", 64.0)
    torch.manual_seed(0)  # two scalings of one test get the same first layer
    return get_scaling("clex")(spec, ClexConfig(**settings)).eval()


def randomise(scaling: Any, std: float, seed: int = 0) -> Any:
    """Random numbers in the last layer of the field, where an untrained one has zeros."""
    generator = torch.Generator().manual_seed(seed)
    last = scaling.field.down if hasattr(scaling.field, "down") else scaling.field.outer
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.normal_(std=std, generator=generator)
    return scaling


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_untrained_is_its_twin(spec: RopeSpec, preset: str) -> None:
    scaling = clex(spec, preset=preset)
    name = {"default": "critical_ntk", "paper": "dynamic_ntk"}[preset]
    twin = get_scaling(name)(spec, ClexConfig(method=name))
    assert_same_bits(scaling.inv_freq(MANY_SCALES), twin.inv_freq(MANY_SCALES))
    # The negative: any weight shows.
    randomise(scaling, 0.01)
    assert not torch.equal(scaling.inv_freq(MANY_SCALES), twin.inv_freq(MANY_SCALES))


@pytest.mark.parametrize("base", ["linear", "yarn", "llama3"])
def test_untrained_is_any_base(base: str) -> None:
    spec = make_spec(Shape(64, 1e4))
    twin = get_scaling(base)(spec, ClexConfig(method=base))
    assert_same_bits(clex(spec, base=base).inv_freq(MANY_SCALES), twin.inv_freq(MANY_SCALES))


def test_untrained_paper_is_the_closed_form() -> None:
    for shape in (Shape(64, 1e4), Shape(128, 1e4), Shape(128, 5e5)):
        scaling = clex(make_spec(shape), preset="paper")
        result = scaling.inv_freq(MANY_SCALES)
        expected = np.stack([references.ntk(shape, 2 * float(t) - 1) for t in MANY_SCALES])
        # The model's own float32 vector and one float32 exponential; measured 4e-7.
        assert_close(result, expected, 1e-6)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("activation_width", [1.0, 0.5])
def test_paper_is_the_released_algorithm(theta: float, activation_width: float) -> None:
    shape = Shape(head_dim=64, theta=theta)
    scaling = randomise(clex(make_spec(shape), preset="paper", width=activation_width), 0.005)
    scales = list(range(1, 17))
    expected = references.released_clex(
        shape,
        up=scaling.field.up.weight.detach().double().numpy().T,
        down=scaling.field.down.weight.detach().double().numpy().T,
        scales=scales,
    )
    result = scaling.inv_freq(torch.tensor(scales, dtype=torch.float32))
    # float32 on a residual of about one, and 64 steps to any t in place of 1500.
    assert_close(result, expected, 1e-5)
    # The negatives: the residual is there, and the fixed base 10,000 inside the net is seen.
    untrained = clex(make_spec(shape), preset="paper").inv_freq(torch.tensor([16.0]))[0]
    assert (result[-1] / untrained).log().abs().max() > 0.05


@pytest.mark.parametrize(
    ("preset", "steps", "std", "tolerance"),
    [
        # What is left in float64 is the error of the steps, 16 times less for twice as many.
        ("paper", 64, 0.005, 1e-6),
        ("default", 16, 0.1, 1e-5),
        # The base's own rate bends near t = 1, which 8 steps to t = 16 do not follow as closely.
        ("default", 8, 0.1, 5e-5),
    ],
)
def test_rk4_agrees_with_dopri5(preset: str, steps: int, std: float, tolerance: float) -> None:
    spec = make_spec(Shape(64, 1e4))
    t = torch.tensor([16.0], dtype=torch.float64)

    def solution(**settings: Any) -> Tensor:
        # A base whose rate is a constant in t would be solved in one step.
        scaling = clex(spec, preset=preset, base="dynamic_ntk", **settings)
        return in_double(randomise(scaling, std)).ratio(t).detach()

    truth = solution(solver="dopri5").numpy()
    assert_close(solution(steps=steps), truth, tolerance)
    with pytest.raises(AssertionError, match="largest relative difference"):
        assert_close(solution(steps=1), truth, tolerance)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_order_of_the_steps(preset: str) -> None:
    spec = make_spec(Shape(32, 1e4))
    t = torch.tensor([4.0], dtype=torch.float64)

    def solution(steps: int) -> Tensor:
        scaling = clex(spec, preset=preset, steps=steps)
        return in_double(randomise(scaling, 0.02 if preset == "paper" else 0.5)).ratio(t).detach()

    truth = solution(256)
    steps = [16, 32, 64]
    errors = [float((solution(n) - truth).abs().max()) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # Finite steps still show the next order.
    assert abs(slope + 4) < 0.35, (slope, errors)


@pytest.mark.parametrize("base", ["critical_ntk", "dynamic_ntk", "yarn", "linear", "llama3"])
# Weights of size 3 make a stiff field: 8 steps, solved anew for each t, then leave errors between
# neighbouring t that are larger than the fall from one to the next. Up to size 1 they do not.
@pytest.mark.parametrize(("std", "steps"), [(0.1, 8), (1.0, 8), (3.0, 64)])
def test_modulated_field_is_bounded_for_any_weights(base: str, std: float, steps: int) -> None:
    spec = make_spec(Shape(64, 1e4))
    for seed in range(2):
        scaling = clex(spec, base=base, bound=1.0, steps=steps)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in scaling.field.parameters():
                parameter.normal_(std=std, generator=generator)
            t = torch.logspace(0, math.log10(64), 50)
            f = scaling.inv_freq(t)
            residual_rate = scaling.field(t, torch.zeros(len(t), 32), scaling.base.rate(t))
        # dz/du = -(base rate) exp(B g) with |g| <= 1, so the share lies in [1/e, e].
        rate, own = scaling.base.rate(t).double(), scaling.base.rate(t) - residual_rate
        assert (own >= rate * math.exp(-1) - 1e-6).all(), (own - rate * math.exp(-1)).min()
        assert (own <= rate * math.exp(1) + 1e-5).all(), (own - rate * math.exp(1)).max()
        assert f.isfinite().all() and (f > 0).all()
        rise = (f.diff(dim=0) / f[1:]).max()
        # Neighbours of a dimension that stays may differ by one rounding.
        assert rise < 2e-7, f"a frequency rises with t by {rise}"


def test_modulated_field_keeps_the_order_of_frequencies() -> None:
    spec = make_spec(Shape(64, 1e4))
    t = torch.logspace(0, math.log10(64), 20)
    for seed in range(10):
        # Not a law: weights of size one can let slow neighbours change places.
        f = randomise(clex(spec), 0.3, seed).inv_freq(t)
        assert (f.diff(dim=1) < 0).all(), f"order lost at {int(f.diff(dim=1).argmax())}"


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_gradients(preset: str) -> None:
    spec = make_spec(Shape(32, 1e4, partial=0.25))
    scaling = in_double(randomise(clex(spec, preset=preset, steps=3), 0.1))
    t = torch.tensor([1.0, 3.5], dtype=torch.float64)
    names = [name for name, _ in scaling.field.named_parameters()]

    def ratio(*values: Tensor) -> Tensor:
        parameters = {f"field.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(_Ratio(scaling), _prefixed(parameters), (t,))

    values = [p.detach().clone().requires_grad_() for p in scaling.field.parameters()]
    assert torch.autograd.gradcheck(ratio, values)


class _Ratio(torch.nn.Module):
    """`functional_call` calls forward, and a scaling has none."""

    def __init__(self, scaling: Any) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(self, t: Tensor) -> Tensor:
        return self.scaling.ratio(t)


def _prefixed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"scaling.{name}": value for name, value in parameters.items()}


def test_parameter_counts() -> None:
    spec = make_spec(Shape(128, 1e4))
    paper = sum(p.numel() for p in clex(spec, preset="paper").field.parameters())
    assert paper == 16_384
    assert sum(p.numel() for p in clex(spec).field.parameters()) < 500


@pytest.mark.parametrize("base", ["ntk", "abf", "clex"])
def test_methods_without_a_rate_are_no_base(base: str) -> None:
    with pytest.raises(ConfigError, match="base"):
        clex(make_spec(Shape(64, 1e4)), base=base)


def test_unknown_field() -> None:
    with pytest.raises(ConfigError, match="did you mean 'modulated'"):
        clex(make_spec(Shape(64, 1e4)), field="modulatd")


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_learned_part_stays_beyond_what_it_is_fitted_for(preset: str) -> None:
    """Frequencies go on from f(4) as the closed form in float64 does, and so does log-n."""
    shape = Shape(32, 1e4, native_length=256)
    spec = make_spec(shape)
    settings = {"preset": preset, "max_scale": 16}
    fitted = randomise(clex(spec, **settings, fitted_scale=4), 0.3)
    free = randomise(clex(spec, **settings), 0.3)
    inside, edge, beyond = torch.tensor([2.5]), torch.tensor([4.0]), torch.tensor([13.0])
    with torch.no_grad():
        assert_same_bits(fitted.inv_freq(inside), free.inv_freq(inside))
        assert_same_bits(fitted.attention_factor(inside), free.attention_factor(inside))
        grown = references.critical_ntk(shape, 13) / references.critical_ntk(shape, 4)
        if preset == "paper":
            grown = references.ntk(shape, 2 * 13 - 1) / references.ntk(shape, 2 * 4 - 1)
        expected = free.inv_freq(edge)[0].double().numpy() * grown
        assert_close(fitted.inv_freq(beyond)[0], expected, 2e-6)
        n = spec.native_length
        grown_by = references.log_n_factor(n, 13.0) / references.log_n_factor(n, 4.0)
        factor = free.attention_factor(edge).double() * grown_by
        assert_close(fitted.attention_factor(beyond), factor.numpy(), 1e-6)
        assert not torch.allclose(fitted.inv_freq(beyond), free.inv_freq(beyond), rtol=1e-3)


def test_fitted_scale_needs_something_learned() -> None:
    with pytest.raises(ConfigError, match="fitted_scale belongs to method 'clex'"):
        ClexConfig(method="yarn", fitted_scale=4)
