"""Exports in the real vLLM: parity with the live model, and each trap sprung on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
import vllm
from torch import Tensor
from typer.testing import CliRunner

from clex.cli import app
from clex.export import verify

# vLLM on the CPU takes heads of 32 and more.
SIZES = {"hidden_size": 128}
HEADS = {**SIZES, "head_dim": 32}
NATIVE, LENGTH = 64, 256
IDS = exports.make_ids(250)
SHORT = IDS[:, :50]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.write_model(tmp_path_factory.mktemp("llama") / "model", **SIZES)


def of_text(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens of a text but the first."""
    return log_probs[0, :-1].gather(1, ids[0, 1:, None])[:, 0]


def live(source: Path, ids: Tensor, t: float = 4.0) -> Tensor:
    return of_text(exports.live(source, ids, t), ids)


def plain(source: Path, ids: Tensor) -> Tensor:
    return of_text(exports.log_probs(exports.plain(source), ids), ids)


def served(folder: Path, ids: Tensor, **settings: Any) -> Tensor:
    """What vLLM says of the tokens of a text but the first; `settings` are a server's own."""
    threads = torch.get_num_threads()
    engine = vllm.LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=True,
        max_num_seqs=2,
        disable_log_stats=True,
        **settings,
    )
    torch.set_num_threads(threads)
    wish = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": ids[0].tolist()}], wish, use_tqdm=False)[0]
    rows = zip(answer.prompt_logprobs[1:], ids[0, 1:].tolist(), strict=True)
    return torch.tensor([row[token].logprob for row, token in rows])


def edit(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the config of an export: `change(config, rope)`, for both spellings of rope."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "rope_scaling"):
        change(config, config[key])
    file.write_text(json.dumps(config))


def without_mscale(config: dict[str, Any], rope: dict[str, Any]) -> None:
    del rope["short_mscale"], rope["long_mscale"]


@pytest.mark.parametrize("form", ["portable", "keep_weights", "two_scales"])
def test_every_form_is_the_live_model(form: Any, llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out", "vllm", form=form)
    parity = verify(tmp_path / "out")
    assert parity.agrees and parity.engine == "vllm"
    assert [row.tokens for row in parity.rows] == [NATIVE, LENGTH - 1]
    for row in parity.rows:
        assert row.most < 5e-4 and row.best == 1
        assert row.from_base > 1000 * row.mean
        print(f"{form} {row.tokens}: max {row.most:.2g} mean {row.mean:.2g}")


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", SIZES),
        ("qwen2", SIZES),
        ("qwen3", HEADS),
        ("phi3", SIZES),
        ("gemma", HEADS),
        # The live side runs sdpa, which leaves the cap of the logits out; vLLM does not.
        ("gemma2", {**HEADS, "tie_word_embeddings": True, "attn_logit_softcapping": None}),
        ("olmo2", SIZES),
        ("phi", {"hidden_size": 256}),
        ("gpt_neox", {"hidden_size": 256}),
    ],
)
def test_families(family: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "model", family, **sizes)
    exports.write_export(source, tmp_path / "out", "vllm")
    parity = verify(tmp_path / "out", lengths=(50, 250))
    print(family, [f"{row.tokens}: max {row.most:.2g} base {row.base:.2g}" for row in parity.rows])
    assert parity.agrees
    assert all(row.from_base > 100 * row.mean for row in parity.rows)


def test_attention_factor_alone_is_ignored(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exports.write_export(llama, out, "vllm", form="keep_weights")
    edit(out, without_mscale)
    parity = verify(out)
    assert not parity.agrees and parity.rows[-1].most > 0.1


def test_the_default_mscale_is_not_one(llama: Path, tmp_path: Path) -> None:
    """Where the original length is below the longest, as in any LongRoPE checkpoint."""
    out = tmp_path / "out"
    exports.write_export(llama, out, "vllm")

    def shorten(config: dict[str, Any], rope: dict[str, Any]) -> None:
        rope["original_max_position_embeddings"] = NATIVE
        config.pop("original_max_position_embeddings", None)

    edit(out, shorten)
    assert verify(out).agrees
    edit(out, without_mscale)
    assert not verify(out).agrees


def test_two_scales_are_chosen_by_the_longest_text(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exports.write_export(llama, out, "vllm", form="two_scales")
    short = served(out, SHORT, max_model_len=NATIVE)
    assert exports.difference(short, plain(llama, SHORT)) < 5e-4
    assert exports.difference(short, live(llama, SHORT)) > 0.1
    # Without a word the folder is the long model, also for short texts.
    assert exports.difference(served(out, SHORT), live(llama, SHORT)) < 5e-4
    # With the original length at the top, the same command serves the short one.

    def at_the_top(config: dict[str, Any], rope: dict[str, Any]) -> None:
        config["original_max_position_embeddings"] = NATIVE

    edit(out, at_the_top)
    trapped = served(out, SHORT)
    assert exports.difference(trapped, plain(llama, SHORT)) < 5e-4
    assert exports.difference(trapped, live(llama, SHORT)) > 0.1


def test_overrides_on_the_folder_of_the_base(llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out", "vllm", form="keep_weights")
    overrides = json.loads((tmp_path / "out" / "hf_overrides.json").read_text())
    found = served(llama, IDS, hf_overrides=overrides, max_model_len=LENGTH)
    assert exports.difference(found, live(llama, IDS)) < 5e-4
    assert exports.difference(found, plain(llama, IDS)) > 0.1


def test_the_command(llama: Path, tmp_path: Path) -> None:
    plain_yarn = [str(llama), "--method", "yarn", "--scale", "4", "--target", "vllm", "--verify"]
    command = ["export", *plain_yarn, "--keep-weights", "--out", str(tmp_path / "out")]
    good = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert good.exit_code == 0, good.output
    edit(tmp_path / "out", without_mscale)
    assert CliRunner().invoke(app, command, env={"COLUMNS": "200"}).exit_code == 1
