"""Every decoder family of the installed transformers, on small random models.

The tests of one family share its model: each leaves it extended and at no held scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clex
import tiny
from clex.errors import ConfigError, UnsupportedModelError
from clex.hf.discovery import find_rotary, layer_types
from clex.hf.extend import require_extension, scale_for
from clex.hf.families import Family, decode, families_markdown, find_out, logits_of
from clex.hf.specimens import VOCABULARY, WINDOW, family_names, has_rotary_code, small_model

DOCS = Path(__file__).parents[2] / "docs" / "families.md"

# Families that have rotary code and cannot be extended, with the words of the refusal.
REFUSED = {
    "beam": "sliding-window layers only",
    "blt": "4 rotary modules",
    "deepseek_v4": "rotary modules",
    "glm5_next_text": "no rotary module",
    "granite_swa": "2 rotary modules",
    "granitemoe_swa": "2 rotary modules",
    "inkling2_text": "no rotary module",
    "molmo2_text": "2 rotary modules (rotary_emb, rotary_emb_unscaled)",
    "moshi": "2 rotary modules (layers.0.self_attn.rotary_emb",
    "recurrent_gemma": "2 rotary modules",
}
WITH_ROTARY = [name for name in family_names() if has_rotary_code(name)]
WORKING = [name for name in WITH_ROTARY if name not in REFUSED]

# These worked by hand in the first version; a release that breaks one must not drop it in silence.
PROMISED = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "olmo",
    "olmo2",
    "falcon",
    "starcoder2",
    "granite",
    "smollm3",
    "ministral3",
    "exaone4",
    "minimax",
    "lfm2",
    "gpt_neox_japanese",
    "phi",
    "gpt_neox",
    "stablelm",
    "persimmon",
    "nemotron",
    "glm4_moe",
    "qwen3_next",
    "phi3",
    "glm",
    "glm4",
    "cohere",
    "cohere2",
    "gpt_oss",
    "llama4_text",
    "deepseek_v2",
    "deepseek_v3",
    "gemma3_text",
    "olmo3",
    "gemma4_text",
    "qwen3_5_text",
    "qwen2_vl_text",
]

# On a GPU these rotate in one kernel; a release that breaks the seam must not do it in silence.
FUSED = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "glm", "gpt_neox"]

# Cached decoding and single rows do the same sums in another order; logits here are of size 1.
ROUNDING = 1e-4
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def run(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return logits_of(model(input_ids=ids, use_cache=False, **inputs))


def shift(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


class Specimen:
    """A small model of one family, extended, with dynamics away from their start."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: Any = small_model(name)
        self.plain = run(self.model)
        clex.extend(self.model, clex.ClexConfig(max_scale=4, steps=2))
        tiny.stir(self.model)


@pytest.fixture(scope="module", params=WORKING)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return Specimen(request.param)


def test_bits_of_plain_model_at_one(specimen: Specimen) -> None:
    with clex.at_scale(specimen.model, 1):
        assert torch.equal(run(specimen.model), specimen.plain), "t = 1 is not the plain model"
    assert torch.equal(run(specimen.model), specimen.plain), "nor is a text that fits"


def test_other_logits_at_four(specimen: Specimen) -> None:
    with clex.at_scale(specimen.model, 4):
        moved = shift(run(specimen.model), specimen.plain)
    assert moved > 0.01 * specimen.plain.std().item(), f"t = 4 moves logits by {moved} only"


def test_gradients_reach_the_dynamics(specimen: Specimen) -> None:
    model = specimen.model.requires_grad_(False)
    parameters = dict(require_extension(model).scalings.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with clex.at_scale(model, 2.7):
        logits_of(model(input_ids=IDS, use_cache=False)).log_softmax(-1)[..., 3].sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        assert parameter.grad.any(), f"{name} has a gradient of 0"
        parameter.grad = None


def test_cached_decoding_equals_one_forward(specimen: Specimen) -> None:
    with clex.at_scale(specimen.model, 2.7):
        difference = shift(decode(specimen.model, IDS, 16), run(specimen.model))
    assert difference <= ROUNDING, f"decoding is off by {difference}"


def test_rows_have_their_own_scale(specimen: Specimen) -> None:
    model = specimen.model
    with clex.at_scale(model, [1.0, 2.7]):
        together = run(model)
    for row, t in enumerate((1.0, 2.7)):
        with clex.at_scale(model, t):
            off = shift(together[row], run(model, IDS[row : row + 1])[0])
        assert off <= ROUNDING, f"row {row} at t = {t} is off by {off} in a batch"
    with clex.at_scale(model, 1.0):
        assert shift(together[1], run(model)[1]) > 100 * ROUNDING * specimen.plain.std()


def test_fused_attention_has_the_bits_of_the_host(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator is plain PyTorch here; tests/kernels say that its kernel does the same."""
    if require_extension(specimen.model).interleaved is None:
        assert specimen.name not in FUSED
        pytest.skip("this family keeps cos and sin")
    with clex.at_scale(specimen.model, [4.0, 2.7]):
        host = run(specimen.model)
        monkeypatch.setattr("clex.hf.rotary.active", lambda tensor: True)
        assert torch.equal(run(specimen.model), host)


def test_saved_and_loaded(specimen: Specimen, tmp_path: Path) -> None:
    clex.save(specimen.model, tmp_path, weights="none")
    loaded = clex.load(tmp_path, small_model(specimen.name))
    with clex.at_scale(specimen.model, 2.7), clex.at_scale(loaded, 2.7):
        assert torch.equal(run(loaded), run(specimen.model)), "the loaded model is another"


def test_restored(specimen: Specimen) -> None:
    state = require_extension(specimen.model)
    assert torch.equal(run(clex.restore(specimen.model)), specimen.plain), "not the plain model"
    parent, name, _ = find_rotary(specimen.model)
    setattr(parent, name, state)


# What is refused.


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str) -> None:
    model = small_model(name)
    with pytest.raises(UnsupportedModelError) as caught:
        clex.extend(model)
    assert type(model).__name__ in str(caught.value)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mamba", "rwkv", "mpt", "opt", "roformer"])
def test_without_rotary_code_is_refused_by_name(name: str) -> None:
    model = small_model(name)
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        clex.extend(model)
    assert find_out(name).status == "refused"


def test_no_promised_family_is_missing() -> None:
    assert len(PROMISED) == 40
    assert not set(PROMISED) - set(WORKING)
    assert not set(REFUSED) - set(WITH_ROTARY)


def test_unknown_family() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        find_out("lama")


# Layer types.


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "gemma4_text"])
def test_layer_types_are_chosen(name: str) -> None:
    plain = run(small_model(name))
    moved = {}
    for chosen in (None, ("full_attention",), ("sliding_attention",)):
        model: Any = small_model(name)
        clex.extend(model, clex.ClexConfig(method="linear", max_scale=4, layer_types=chosen))
        keys = tuple(require_extension(model).scalings)
        assert keys == (chosen or ("full_attention",))
        with clex.at_scale(model, 4):
            moved[chosen] = run(model)
        assert not torch.equal(moved[chosen], plain)
    assert torch.equal(moved[None], moved[("full_attention",)])
    assert not torch.equal(moved[None], moved[("sliding_attention",)])


def test_unknown_layer_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="valid: full_attention, sliding_attention"):
        clex.extend(small_model("gemma3_text"), clex.ClexConfig(layer_types=("global",)))


def test_sliding_layers_alone_on_demand() -> None:
    model: Any = small_model("beam")
    plain = run(model)
    clex.extend(model, clex.ClexConfig(max_scale=4, layer_types=("sliding_attention",)))
    with clex.at_scale(model, 4):
        assert not torch.equal(run(model), plain)


@pytest.mark.parametrize(
    "settings",
    [{"method": m} for m in ("linear", "ntk", "dynamic_ntk", "yarn", "abf", "llama3")]
    + [{"preset": p} for p in ("default", "paper")]
    + [{"method": "yarn", "post": ("clip", "resonance", "p_rope")}],
    ids=str,
)
def test_frequencies_of_zero_stay(settings: dict[str, Any]) -> None:
    """Gemma 4 rotates a quarter of each head in its full layers and has zeros for the rest."""
    options = {"options": {"rope_theta": 1e7}} if settings.get("method") == "abf" else {}
    model: Any = small_model("gemma4_text")
    native = find_rotary(model)[2].full_attention_inv_freq.clone()
    rotating = native > 0
    assert 0 < rotating.sum() < len(native)
    clex.extend(model, clex.ClexConfig(max_scale=4, **settings, **options))
    with torch.no_grad():
        for parameter in require_extension(model).scalings.parameters():
            parameter.normal_(std=0.02)
    four = clex.frequencies(model, 4)["full_attention"]
    assert (four[~rotating] == 0).all(), "a frequency of zero must stay zero"
    assert four.isfinite().all()
    assert not torch.equal(four[rotating], native[rotating])


def test_frequencies_of_zero_do_not_reach_the_others() -> None:
    """The released field mixes all dimensions."""
    model: Any = small_model("gemma4_text")
    rotating = find_rotary(model)[2].full_attention_inv_freq > 0
    clex.extend(model, clex.ClexConfig(preset="paper", max_scale=4))
    tiny.stir(model, std=0.05)
    field: Any = require_extension(model).scalings["full_attention"].field
    before = clex.frequencies(model, 4)["full_attention"]
    with torch.no_grad():
        field.up.weight[:, ~rotating] += 1
    assert torch.equal(clex.frequencies(model, 4)["full_attention"], before)
    with torch.no_grad():
        field.up.weight[:, rotating] += 1
    assert not torch.equal(clex.frequencies(model, 4)["full_attention"], before)


# Positions and windows.


def test_three_rows_of_positions() -> None:
    """The scale comes from the largest position of the three rows."""
    model: Any = small_model("qwen2_vl_text")
    clex.extend(model, clex.ClexConfig(max_scale=4, grid="none"))
    plain = torch.arange(24).expand(3, 2, 24)
    far = plain.clone()
    far[1, :, -1] = 3 * WINDOW - 1
    with clex.at_scale(model, 3.0):
        held = run(model, position_ids=far)
    assert torch.equal(run(model, position_ids=far), held)
    with clex.at_scale(model, 1.0):
        assert not torch.equal(run(model, position_ids=far), held)
    assert torch.equal(run(model, position_ids=plain), run(clex.restore(model)))


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            WINDOW,
        ),
    ],
    ids=["yarn", "llama3"],
)
def test_a_rope_type_of_its_own_is_the_start(rope: dict[str, Any], window: int) -> None:
    """Its frequencies and factor are those of t = 1, and t = 1 ends where its own window does."""
    model: Any = small_model("llama", rope_parameters={**rope, "rope_theta": 1e4})
    stock = find_rotary(model)[2]
    native, factor, before = stock.inv_freq.clone(), stock.attention_scaling, run(model)
    assert not torch.equal(native, find_rotary(small_model("llama"))[2].inv_freq)
    clex.extend(model, clex.ClexConfig(max_scale=4))
    assert torch.equal(clex.frequencies(model, 1), native)
    assert require_extension(model).attention_scaling == factor
    assert torch.equal(run(model), before)
    assert scale_for(model, window) == 1 < scale_for(model, window + 1)


# What the page and the table say.


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", {"pairs": "half", "table": "cos, sin", "rotated": 1.0}),
        ("gpt_neox", {"pairs": "half", "rotated": 0.25}),
        ("glm", {"pairs": "interleaved", "rotated": 0.5}),
        ("cohere", {"pairs": "interleaved", "rotated": 1.0}),
        ("gpt_oss", {"pairs": "half", "table": "half width"}),
        ("llama4_text", {"pairs": "interleaved", "table": "complex"}),
        ("deepseek_v3", {"latent": True}),
        ("qwen2_vl_text", {"position_rows": 3}),
        ("gemma3_text", {"layer_types": ("full_attention",), "kept": ("sliding_attention",)}),
        ("moshi", {"status": "refused"}),
    ],
)
def test_layout_is_found(name: str, wanted: dict[str, Any]) -> None:
    found = find_out(name)
    assert {key: getattr(found, key) for key in wanted} == wanted


def test_page_lists_what_is_tested() -> None:
    """Regenerate it with the command that is written at its top."""
    works, refused = DOCS.read_text(encoding="utf-8").split("## Refused")
    for name in family_names():
        page = works if name in WORKING else refused
        assert f"| {name} |" in page, f"{name} is not where it belongs"


def test_page_is_made_of_rows() -> None:
    rows = [
        Family(name="a", model="A", status="works", pairs="half", rotated=1.0, decode_error=2e-6),
        Family(name="b", model="B", status="refused", reason="no rotary"),
    ]
    page = families_markdown(rows)
    assert "| a | works | half |" in page and "| b | refused | no rotary |" in page
    assert "Of 2 text decoders" in page and "clex families --markdown" in page


def test_layer_types_of_one_vector() -> None:
    assert layer_types(find_rotary(small_model("llama"))[2]) == ()
