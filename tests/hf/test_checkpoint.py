"""Saving and loading: what comes back, what is refused, and what a failed write leaves."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

import clex
import tiny
from clex.errors import CheckpointError, ClexError, OutputError
from clex.hf import checkpoint
from clex.hf.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from clex.hf.extend import config_of, extension_of

IDS = tiny.make_ids(1, 150)  # past the native window: t is 2.38


def make(family: str = "llama", **settings: Any) -> Any:
    model = clex.extend(tiny.make_model(family), clex.ClexConfig(max_scale=4, **settings))
    tiny.stir(model)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The dynamics of a tiny LLaMA."""
    return clex.save(make(), tmp_path / "saved", weights="none")


def same(model: Any, wanted: Tensor) -> bool:
    return torch.equal(tiny.logits(model, IDS), wanted)


def test_dynamics_alone(family: str, tmp_path: Path) -> None:
    model = make(family)
    clex.save(model, tmp_path, weights="none")
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    loaded = clex.load(tmp_path, tiny.make_model(family))
    assert same(loaded, tiny.logits(model, IDS))
    assert not same(clex.extend(tiny.make_model(family), config_of(model)), tiny.logits(model, IDS))
    assert config_of(loaded) == config_of(model)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_presets(preset: str, tmp_path: Path) -> None:
    model = make(preset=preset)
    clex.save(model, tmp_path, weights="none")
    assert same(clex.load(tmp_path, tiny.make_model()), tiny.logits(model, IDS))


@pytest.mark.parametrize("method", ["yarn", "none"])
def test_closed_form(method: str, tmp_path: Path) -> None:
    model = clex.extend(tiny.make_model(), clex.ClexConfig(method=method, max_scale=4))
    clex.save(model, tmp_path, weights="none")
    assert same(clex.load(tmp_path, tiny.make_model()), tiny.logits(model, IDS))


def test_base_model_by_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.make_model().save_pretrained(base)
    model = make()
    clex.save(model, tmp_path / "named", weights="none", base_model=str(base))
    assert same(clex.load(tmp_path / "named"), tiny.logits(model, IDS))
    clex.save(model, tmp_path / "nameless", weights="none")
    with pytest.raises(CheckpointError, match="names no base model"):
        clex.load(tmp_path / "nameless")


def test_full(family: str, tmp_path: Path) -> None:
    model = make(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)  # as if it was trained
    clex.save(model, tmp_path)
    assert same(clex.load(tmp_path), tiny.logits(model, IDS))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "scalings" in name or "stock" in name]  # noqa: SIM118


def test_full_is_the_plain_model_for_others(family: str, tmp_path: Path) -> None:
    model = make(family)
    clex.save(model, tmp_path)
    plain, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert extension_of(plain) is None
    with clex.at_scale(model, 1):
        assert same(plain, tiny.logits(model, IDS))
    assert not same(plain, tiny.logits(model, IDS))


def test_full_with_tied_embeddings(tmp_path: Path) -> None:
    model = clex.extend(tiny.make_model(tie_word_embeddings=True), clex.ClexConfig(max_scale=4))
    tiny.stir(model)
    clex.save(model, tmp_path)
    assert same(clex.load(tmp_path), tiny.logits(model, IDS))


def test_adapter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.make_model().save_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make(), lora).eval()
    out = clex.save(model, tmp_path / "out", weights="adapter", base_model=str(base))
    loaded = clex.load(out)
    assert isinstance(loaded, peft.PeftModel)
    assert same(loaded, tiny.logits(model, IDS))
    with model.disable_adapter():
        assert not same(loaded, tiny.logits(model, IDS))
    assert same(clex.load(out, tiny.make_model()), tiny.logits(model, IDS))


def test_adapter_of_a_bare_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter"):
        clex.save(make(), tmp_path / "out", weights="adapter")
    assert not (tmp_path / "out").exists()


def test_plain_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClexError, match="not extended"):
        clex.save(tiny.make_model(), tmp_path)
    assert not list(tmp_path.iterdir())


# Files that are not what they should be.


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    edit(folder, lambda about: about.pop("sha256"))  # even where no digest is known


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads((folder / CONFIG_FILE).read_text())
    change(about)
    (folder / CONFIG_FILE).write_text(json.dumps(about))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte": (flip_a_byte, "is damaged: its SHA-256"),
    "cut short": (cut_short, "cannot read"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), f"no {WEIGHTS_FILE} in"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), f"no {CONFIG_FILE} in"),
    "not JSON": (lambda f: (f / CONFIG_FILE).write_text('{"clex": '), "cannot read"),
    "not a dictionary": (lambda f: (f / CONFIG_FILE).write_text("[1]"), "no 'clex' section"),
    "not text": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "unknown key": (
        lambda f: edit(f, lambda about: about["clex"].update(widht=1.0)),
        "unknown setting 'widht'; did you mean 'width'",
    ),
    "other width": (
        lambda f: edit(f, lambda about: about["clex"].update(width=1.0)),
        "has shape",
    ),
    "other field": (
        lambda f: edit(f, lambda about: about["clex"].update(field="released")),
        "does not fit its config: missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(saved: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    clex.load(saved, tiny.make_model())
    damage(saved)
    with pytest.raises(ClexError, match=words) as caught:
        clex.load(saved, tiny.make_model())
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        next(iter(model.model.rotary_emb.scalings.parameters())).fill_(float("nan"))
    clex.save(model, tmp_path, weights="none")
    with pytest.raises(CheckpointError, match="not finite"):
        clex.load(tmp_path, tiny.make_model())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"head_dim": 32},
    ],
    ids=["theta", "head size"],
)
def test_other_model_is_refused(saved: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="made for another model"):
        clex.load(saved, tiny.make_model(**changes))
    clex.load(saved, tiny.make_model(num_hidden_layers=3))  # the rotary is the same


def test_refused_checkpoint_leaves_the_model_plain(saved: Path) -> None:
    flip_a_byte(saved)
    model = tiny.make_model()
    with pytest.raises(CheckpointError):
        clex.load(saved, model)
    assert extension_of(model) is None


# Writes that fail.


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_says_safetensors(*_: Any, **__: Any) -> None:
    # The library writes by itself and tells of the system's error in words only.
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    "failure",
    [
        disk_full,
        disk_full_says_safetensors,
    ],
)
def test_disk_full_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., None]
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", failure)
    with pytest.raises(OutputError, match=r"(?i)no space left"):
        clex.save(make(), tmp_path / "out", weights="none")
    assert not list((tmp_path / "out").iterdir())
    assert not checkpoint.is_checkpoint(tmp_path / "out")


def test_disk_full_at_the_weights_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    monkeypatch.setattr(type(model), "save_pretrained", disk_full)
    with pytest.raises(OutputError, match=r"(?i)no space left"):
        clex.save(model, tmp_path / "out")


def test_failed_write_keeps_the_older_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tiny.logits(clex.load(saved, tiny.make_model()), IDS)
    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(OutputError):
        clex.save(make(width=1.0), saved, weights="none")
    assert same(clex.load(saved, tiny.make_model()), wanted)


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match="cannot write"):
        clex.save(make(), tmp_path / "file" / "out", weights="none")


def test_nothing_is_executed(saved: Path) -> None:
    # JSON and safetensors only: no pickle comes in by another name.
    (saved / WEIGHTS_FILE).unlink()
    torch.save({"all.field.inner.weight": torch.zeros(1)}, saved / "clex.bin")
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS_FILE} in"):
        clex.load(saved, tiny.make_model())
