"""Post-operations: each against numpy float64, and each on every method."""

import json
import math

import numpy as np
import pytest
import torch
from test_contract import CASES, SCALES, SHAPE, make
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import clex
import tiny
from clex.config import ClexConfig
from clex.errors import ConfigError
from clex.rope import RopeSpec
from clex.scaling import get_scaling
from clex.scaling.post import POSTS, make_posts
from references import Shape, Vector, assert_close, assert_same_bits, make_spec

COMBINATIONS = [*((name,) for name in POSTS), ("clip", "resonance"), ("resonance", "p_rope:0.5")]


def reference(f: Vector, name: str) -> Vector:
    """The three formulas, as published, slowly."""
    f, many = f.copy(), len(f)
    if name == "clip":
        n = round(20 * many / 64)
        for j in range(n):
            f[many - n + j] *= (1 + math.cos(math.pi * j / (n - 1))) / 2
        return f
    if name == "resonance":
        rotates = f > 0
        f[rotates] = 2 * math.pi / np.round(2 * math.pi / f[rotates])
        return f
    share = float(name.partition(":")[2] or 0.25)
    f[many - round(share * many) :] = 0
    return f


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=COMBINATIONS, ids="+".join)
def post(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def test_follows_the_method(case: tuple[str, str], post: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    plain = make(case).inv_freq(SCALES).detach()
    torch.manual_seed(0)
    result = make(case, post=post).inv_freq(SCALES)
    # Its own curve at t = 1, bit for bit.
    assert_same_bits(result[0], plain[0])
    assert result.shape == (6, 32) and result.dtype == torch.float32
    assert result.isfinite().all() and (result >= 0).all()
    expected = plain[1:].double().numpy()
    for name in post:
        # As the code does between two operations; a wavelength at .5 would round otherwise.
        expected = np.stack([reference(f, name) for f in expected]).astype(np.float32)
        expected = expected.astype(np.float64)
    # One product or quotient in float32. Its rounding can move a wavelength of some million tokens
    # past a half, and with it what resonance makes of it by one token.
    assert_close(result[1:], expected, 2e-7 if len(post) == 1 else 6e-7)
    # The negative: nothing but a method that rotates nothing comes out unchanged.
    changed = not torch.equal(result[1:], plain[1:])
    assert changed == get_scaling(case[0]).rotates


def test_dimensions_that_do_not_rotate(case: tuple[str, str], post: tuple[str, ...]) -> None:
    inv_freq = make_spec(SHAPE).inv_freq.clone()
    inv_freq[20:] = 0
    result = make(case, RopeSpec(inv_freq, 2048, 1e4), post=post).inv_freq(SCALES)
    assert result.isfinite().all() and (result[:, 20:] == 0).all()
    # Shares are of the 20 that rotate: none of the operations stops at the zeros that were there.
    if "p_rope" in post and get_scaling(case[0]).rotates:
        assert (result[1:, 15:] == 0).all() and (result[1:, :15] > 0).all()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_learned_dynamics_have_gradients(post: tuple[str, ...], preset: str) -> None:
    scaling = make(("clex", preset), post=post).train()
    scaling.inv_freq(torch.ones(2)).sum().backward()
    learned = {k: p for k, p in scaling.named_parameters() if k.startswith("field")}
    assert learned
    for name, parameter in learned.items():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name
    scaling.inv_freq(torch.tensor([1.0, 4.0])).sum().backward()
    for name, parameter in learned.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_gradients_of_the_operations() -> None:
    spec = make_spec(SHAPE)
    f = (spec.inv_freq / 3)[None].requires_grad_()
    resonance, clip = (make_posts([name], spec)[0] for name in ("resonance", "clip"))
    (gradient,) = torch.autograd.grad(resonance(f).sum(), f)
    assert torch.equal(gradient, torch.ones(1, 32)), "straight through the rounding"
    (gradient,) = torch.autograd.grad(clip(f).sum(), f)
    expected = reference(np.ones(32), "clip")
    assert_close(gradient[0], expected, 1e-7)


def test_order_matters() -> None:
    one = make(("yarn", "default"), post=("clip", "resonance")).inv_freq(SCALES)
    other = make(("yarn", "default"), post=("resonance", "clip")).inv_freq(SCALES)
    assert not torch.equal(one, other)
    wavelength = 2 * math.pi / one[1:].double()
    whole = wavelength.isinf() | ((wavelength - wavelength.round()).abs() < 1e-6 * wavelength)
    assert whole.all(), "resonance came last"


def test_published_numbers() -> None:
    """20 of 64 for the soft clip; 6.28 becomes 6 tokens; 16 of 64 are zeroed."""
    spec = make_spec(Shape(128, 1e4))
    result = {name: make_posts([name], spec)[0](spec.inv_freq[None])[0] for name in POSTS}
    kept = result["clip"] == spec.inv_freq
    assert kept[:45].all() and not kept[45:].any()  # the first of the 20 has weight 1
    assert result["clip"][-1] == 0 and (result["clip"][:-1] > 0).all()
    assert_close(result["resonance"][:1], [1.0471975512], 1e-7)
    assert (result["p_rope"] == 0).sum() == 16


def test_long_wavelengths_round_in_float64() -> None:
    f = torch.tensor([6e-7, 7.3e-7, 9.1e-8])
    resonance = make_posts(["resonance"], RopeSpec(f, 2048, 1e8))[0]
    f64 = f.double().numpy()
    assert_close(resonance(f[None])[0], 2 * math.pi / np.round(2 * math.pi / f64), 6e-8)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_p_rope_is_proportional_of_transformers(head_dim: int, share: float) -> None:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": 1e4,
            "partial_rotary_factor": round(1 - share, 2),
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"))
    settings = ClexConfig(method="none", post=(f"p_rope:{share}",))
    result = get_scaling("none")(make_spec(Shape(head_dim, 1e4)), settings)
    assert_close(result.inv_freq(torch.tensor([4.0]))[0], expected.double().numpy(), 2e-7)


def test_casts_are_ignored(post: tuple[str, ...]) -> None:
    scaling = make(("dynamic_ntk", "default"), post=post)
    before = scaling.inv_freq(SCALES)
    for cast in (torch.bfloat16, torch.float64):
        scaling.to(cast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(scaling.inv_freq(SCALES), before)
    assert not [name for name in scaling.state_dict() if "post" in name]


def test_config_round_trip(post: tuple[str, ...]) -> None:
    config = ClexConfig(method="yarn", post=post)
    again = ClexConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.post == post
    assert config.replace(method="ntk").post == post
    assert ClexConfig.from_dict({"method": "yarn"}).post == ()


@pytest.mark.parametrize(
    ("post", "words"),
    [
        (("clipp",), "unknown post-operation 'clipp'; did you mean 'clip'"),
        (("resonanc",), "did you mean 'resonance'"),
        (("prope",), "did you mean 'p_rope'"),
        (("clip:0.5",), "'clip' takes no number"),
        (("p_rope:1.5",), "above 0 and below 1, not 1.5"),
        (("p_rope:nan",), "above 0 and below 1, not nan"),
        (("p_rope:half",), "'p_rope' is no number: 'p_rope:half'"),
        (("",), "unknown post-operation ''"),
    ],
)
def test_bad_names(post: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(("yarn", "default"), post=post)


@pytest.mark.parametrize("post", ["clip", 3, [1], None])
def test_bad_lists(post: object) -> None:
    with pytest.raises(ConfigError, match="post must be a list of names"):
        ClexConfig(post=post)  # type: ignore[arg-type]


def test_in_a_model(post: tuple[str, ...]) -> None:
    ids, logits = tiny.make_ids(2, 40), {}
    stock = tiny.logits(tiny.make_model(), ids)
    for names in ((), post):
        model = clex.extend(tiny.make_model(), ClexConfig(method="yarn", max_scale=4, post=names))
        with clex.at_scale(model, 1):
            assert torch.equal(tiny.logits(model, ids), stock)
        with clex.at_scale(model, 4):
            logits[names] = tiny.logits(model, ids)
    assert (logits[()] - logits[post]).abs().max() > 1e-3
