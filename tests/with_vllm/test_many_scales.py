"""One server, a scale for each request: mixed batches against the live model at each one's t."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import pytest
import torch
import vllm
from torch import Tensor
from typer.testing import CliRunner
from vllm.config import CompilationMode
from vllm.exceptions import VLLMValidationError

from clex.cli import app
from clex.errors import ConfigError, UnsupportedModelError
from clex.export import verify
from clex.serving import vllm_models
from clex.serving.length_classes import LengthClasses
from clex.serving.vllm_requests import RequestScales

SIZES = {"hidden_size": 128}
HEADS = {**SIZES, "head_dim": 32}
SCALES = (1.0, 2.0, 4.0)
NATIVE = 64
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.write_model(tmp_path_factory.mktemp("llama") / "model", **SIZES)


@pytest.fixture(scope="module")
def out(llama: Path) -> Path:
    write(llama, llama.parent / "out")
    return llama.parent / "out"


def write(source: Path, out: Path) -> None:
    exports.write_export(source, out, "vllm", scale=None, scales=SCALES)


def start(folder: Path, **settings: Any) -> vllm.LLM:
    threads = torch.get_num_threads()
    given: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "disable_log_stats": True,
        "logits_processors": [RequestScales],
        **settings,
    }
    try:
        return vllm.LLM(str(folder), **given)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[vllm.LLM]:
    """Prompts are read in pieces of 48 tokens, and four requests run at once.

    A process has one vLLM at a time, and the next one ends it: tests that take this come first.
    """
    yield start(out, max_num_seqs=4, max_num_batched_tokens=48)


def ask(
    server: vllm.LLM,
    prompts: list[Tensor],
    new: list[int],
    wishes: list[Any],
    *,
    rate_prompts: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """All requests together: whole texts (1, T), and what vLLM says of their tokens but the first.

    Args:
        server: that answers.
        prompts: tokens (1, T) of each.
        new: tokens that each goes on for.
        wishes: `clex_scale` of each, or ``None``.
        rate_prompts: if not, only the tokens of the answers are rated.
    """
    params = [
        vllm.SamplingParams(
            max_tokens=n,
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=0 if rate_prompts else None,
            logprobs=0,
            detokenize=False,
            extra_args=None if wish is None else {"clex_scale": wish},
        )
        for n, wish in zip(new, wishes, strict=True)
    ]
    inputs = [{"prompt_token_ids": ids[0].tolist()} for ids in prompts]
    found = []
    for answer in server.generate(inputs, params, use_tqdm=False):
        text = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
        rows = [*(answer.prompt_logprobs or [])[1:], *answer.outputs[0].logprobs]
        rated = text[len(text) - len(rows) :]
        said = [row[token].logprob for row, token in zip(rows, rated, strict=True)]
        found.append((torch.tensor([text]), torch.tensor(said)))
    return found


def live(source: Path, ids: Tensor, t: float) -> Tensor:
    return exports.live(source, ids, t)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]


def test_each_request_of_a_batch_has_its_own_scale(
    llama: Path, server: vllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prompt, new tokens, wish, and the t that this must mean: classes end at 64, 128, 256.
    requests = (
        (40, 8, None, 1.0),
        (200, 30, None, 4.0),
        (100, 5, None, 2.0),
        (50, 14, None, 1.0),
        (50, 15, None, 2.0),
        (30, 100, None, 4.0),
        (40, 8, 4, 4.0),
        (40, 8, 1.5, 2.0),
        (100, 5, 1, 2.0),
        (248, 8, None, 4.0),
        (20, 3, 99, 4.0),
    )
    mixed, moved = [], []
    plain_update = RequestScales.update_state

    def watched(self: RequestScales, update: Any) -> None:
        plain_update(self, update)
        if update is not None:
            mixed.append(len(set(self.offsets[: update.batch_size].tolist())))
            moved.extend(update.moved)

    monkeypatch.setattr(RequestScales, "update_state", watched)
    prompts = [exports.make_ids(n, seed=i) for i, (n, *_) in enumerate(requests)]
    answers = ask(server, prompts, [r[1] for r in requests], [r[2] for r in requests])
    # The test is worth nothing if scales never met in a batch, or no request changed its row.
    assert max(mixed) == 3 and moved
    for (prompt, new, wish, t), (ids, said) in zip(requests, answers, strict=True):
        assert ids.shape[1] == prompt + new
        away = (said - live(llama, ids, t)).abs()
        print(f"{prompt}+{new} wish {wish} t {t:g}: max {away.max():.2g} mean {away.mean():.2g}")
        assert away.max() < 1e-4
        for other in SCALES:
            if other != t:
                assert exports.difference(said, live(llama, ids, other)) > 0.1


@pytest.mark.parametrize("wish", [0.5, "two", float("nan")])
def test_a_wish_that_is_no_scale_is_refused_and_the_server_goes_on(
    wish: Any, llama: Path, server: vllm.LLM
) -> None:
    ids = exports.make_ids(100)
    with pytest.raises(VLLMValidationError, match="clex_scale must be a number"):
        ask(server, [ids], [5], [wish])
    ((ids, said),) = ask(server, [ids], [5], [None])
    assert exports.difference(said, live(llama, ids, 2.0)) < 1e-4


def test_short_requests_are_the_plain_model_bit_for_bit(llama: Path, server: vllm.LLM) -> None:
    ids = exports.make_ids(40)
    ((_, said),) = ask(server, [ids], [8], [None])
    plain = start(llama, logits_processors=None, max_num_seqs=4, max_num_batched_tokens=48)
    ((_, wanted),) = ask(plain, [ids], [8], [None])
    assert torch.equal(said, wanted)


def test_compiled(llama: Path, out: Path) -> None:
    server = start(out, enforce_eager=False, max_num_seqs=4, max_num_batched_tokens=48)
    assert server.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
    prompts = [exports.make_ids(n, seed=n) for n in (40, 200, 100)]
    for (ids, said), t in zip(ask(server, prompts, [8] * 3, [None] * 3), (1, 4, 2), strict=True):
        assert exports.difference(said, live(llama, ids, t)) < 1e-4


def test_requests_that_are_put_off_come_back_at_their_scale(
    llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for the prompts but not for the answers, keys are thrown away and made again."""
    added = []
    plain_update = RequestScales.update_state

    def watched(self: RequestScales, update: Any) -> None:
        plain_update(self, update)
        added.extend(update.added if update is not None else [])

    monkeypatch.setattr(RequestScales, "update_state", watched)
    # Blocks of 128 tokens; one of them is vLLM's own.
    server = start(out, max_num_seqs=4, num_gpu_blocks_override=4)
    prompts = [exports.make_ids(n, seed=n) for n in (120, 110, 100)]
    answers = ask(server, prompts, [40] * 3, [None] * 3, rate_prompts=False)
    assert len(added) > len(prompts)
    for ids, said in answers:
        assert exports.difference(said, live(llama, ids, 4.0)[-40:]) < 1e-4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"enable_prefix_caching": True}, "keys of another scale"),
        ({"logits_processors": None}, "--logits-processors clex.serving.vllm_requests"),
    ],
)
def test_what_would_mix_scales_is_refused(settings: Any, reason: str, out: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        start(out, **settings)


def test_the_processor_alone_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="no clex_scales"):
        start(llama)


def test_without_the_plugin_the_folder_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = vllm.ModelRegistry.models
    monkeypatch.delitem(registry, "ClexLlamaForCausalLM")
    with pytest.raises(ValueError, match="ClexLlamaForCausalLM"):
        start(out)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", SIZES),
        ("qwen2", SIZES),
        ("qwen3", HEADS),
        ("phi3", {**SIZES, "rope_parameters": PARTIAL}),
        ("gemma", HEADS),
        # As in the tests of one scale: without the cap that only vLLM knows.
        ("gemma2", {**HEADS, "tie_word_embeddings": True, "attn_logit_softcapping": None}),
    ],
)
def test_families(family: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "model", family, **sizes)
    write(source, tmp_path / "out")
    parity = verify(tmp_path / "out", lengths=(50,))
    print(family, [f"t {row.scale:g}: max {row.most:.2g}" for row in parity.rows])
    assert [row.scale for row in parity.rows] == list(SCALES)
    assert all(row.most < 1e-4 for row in parity.rows)
    assert parity.rows[0].base == 0 and all(row.base > 0.01 for row in parity.rows[1:])


def test_the_command_and_a_stale_table(llama: Path, tmp_path: Path) -> None:
    command = ["export", str(llama), "--method", "yarn", "--scales", "1,2,4", "--target", "vllm"]
    command += ["--verify", "--out", str(tmp_path / "out")]
    good = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert good.exit_code == 0, good.output
    # Tables of one class for all: what verify must see.
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    classes = LengthClasses.from_dict(config["clex_scales"]).to_dict()
    classes["inv_freq"] = [classes["inv_freq"][-1]] * len(SCALES)
    file.write_text(json.dumps({**config, "clex_scales": classes}))
    assert CliRunner().invoke(app, command, env={"COLUMNS": "200"}).exit_code == 1


def test_a_longer_window_than_the_longest_class_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with pytest.raises(ConfigError, match="max_model_len is 512"):
        start(out, max_model_len=512)


def test_a_backend_without_request_borders_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(attn_metadata={"layer": SimpleNamespace()})
    monkeypatch.setattr(vllm_models, "get_forward_context", lambda: context)
    model = SimpleNamespace(shifted=torch.zeros(8, dtype=torch.int64))
    with pytest.raises(UnsupportedModelError, match="--attention-backend"):
        vllm_models.ManyScales._rows_of(model, torch.arange(4))
