"""The whole job and its command line: results, coming back, errors that leave nothing behind."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import clex
import clex.run
import tiny
from clex import cli
from clex.errors import ConfigError, OutputError
from clex.evaluation.perplexity import PerplexityPlan, evaluate_extended, evaluate_methods
from clex.hf.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_config, read_about
from clex.hf.extend import config_of
from clex.hf.models import load_base
from clex.run import EvalConfig, run_extend
from clex.start import CANDIDATES
from clex.training import TrainConfig

RESULTS = ("results.json", "results.csv", "perplexity.png")


@dataclass(frozen=True)
class Inputs:
    """Files that the commands of this module read."""

    model: Path
    data: Path
    other: Path
    gpt2: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    folder = tmp_path_factory.mktemp("inputs")
    with tiny.token_cache(folder / "cache"):
        yield Inputs(
            model=tiny.write_model(folder / "model"),
            data=tiny.write_documents(folder / "data.jsonl", [290 + 3 * i for i in range(12)]),
            other=tiny.write_model(folder / "other", "llama", head_dim=32),
            gpt2=_write_gpt2(folder / "gpt2"),
        )


def _write_gpt2(folder: Path) -> Path:
    import transformers

    config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2)
    tiny.build(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: exit code, and what it said on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["clex", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().err

    return run


def extend_arguments(inputs: Inputs, out: Path, **changes: object) -> list[object]:
    """A run of two steps; a change to ``None`` leaves an option out, ``True`` makes it a flag."""
    options: dict[str, object] = {
        "data": inputs.data,
        "out": out,
        "max_scale": 4,
        "steps": 2,
        "save_every": 1,
        "set": "steps=4",  # of the solver: a quarter of the usual time
        **changes,
    }
    arguments: list[object] = ["extend", options.pop("model", inputs.model)]
    for name, value in options.items():
        if value is not None:
            arguments.append("--" + name.replace("_", "-"))
            if value is not True:
                arguments.append(value)
    return arguments


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return rows


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", ["clex", *map(str, extend_arguments(inputs, out))])
        cli.main()
    assert not caught.value.code
    return out


# A run from end to end.


def test_results(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names == {
        *RESULTS,
        "run.json",
        "baseline.json",
        "selection.json",
        "differences.csv",
        "documents.jsonl",
        "log.jsonl",
        "training.png",
        "tensorboard",
        CONFIG_FILE,
        WEIGHTS_FILE,
        "checkpoints",
    }
    rows = read_rows(finished)
    cells = {(r["method"], r["length"], r["protocol"]) for r in rows}
    methods, lengths = ("base", "yarn", "clex"), (16, 32, 64, 128, 256)
    curves = {(m, n, p) for m in methods for n in lengths for p in ("window", "target")}
    assert cells == curves | {(m, 256, "position") for m in methods}
    assert len(rows) == len(curves) + 16 * len(methods)
    for row in rows:
        assert row["documents"] == 1  # a tenth of 12
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
        assert row["ppl"] > 10  # a random model
        assert row["scale"] == (1 if row["method"] == "base" else max(1, row["length"] / 64))
    with (finished / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["ppl"]) for r in table] == [r["ppl"] for r in rows]
    assert (finished / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert len((finished / "log.jsonl").read_text().splitlines()) == 2


def test_record_of_the_run(finished: Path, inputs: Inputs) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert record["settings"]["model"] == str(inputs.model)
    assert record["settings"]["training"]["steps"] == 2
    assert record["settings"]["clex"]["max_scale"] == 4
    assert {"clex", "torch", "transformers", "python", "device"} <= record["versions"].keys()


def test_same_at_native_length_different_above(finished: Path) -> None:
    by_cell = {(r["method"], r["length"], r["protocol"]): r["ppl"] for r in read_rows(finished)}
    # Bit-equal logits at t = 1, so the very same number.
    assert by_cell["base", 64, "window"] == by_cell["clex", 64, "window"]
    assert by_cell["base", 64, "target"] == by_cell["clex", 64, "target"]
    assert len({by_cell[m, 256, "window"] for m in ("base", "yarn", "clex")}) == 3


def test_result_is_loaded_by_name(finished: Path) -> None:
    model = clex.load(finished)
    assert clex.frequencies(model, 4).shape == (8,)


def test_same_command_again(finished: Path, inputs: Inputs, call: Cli) -> None:
    before = listing(finished)
    code, said = call(*extend_arguments(inputs, finished))
    assert code == 0
    assert "finished" in said
    assert "clex" in said  # the table
    assert listing(finished) == before


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"steps": 3}, "training.steps"),
        ({"max_scale": 3}, "clex.max_scale"),
        ({"seed": 1}, "training.seed"),
        ({"rivals": "base"}, "evaluation.rivals"),
    ],
)
def test_other_settings_are_refused(
    finished: Path, inputs: Inputs, call: Cli, change: dict[str, object], setting: str
) -> None:
    before = listing(finished)
    code, said = call(*extend_arguments(inputs, finished, **change))
    assert code == 2
    assert setting in said
    assert "--overwrite" in said
    assert listing(finished) == before


def test_run_of_another_number_of_windows_says_what_to_pass(
    finished: Path, inputs: Inputs, call: Cli, tmp_path: Path
) -> None:
    """As after a start with other processes; `--overwrite` would throw the run away."""
    out = shutil.copytree(finished, tmp_path / "out")
    record = json.loads((out / "run.json").read_text())
    record["settings"]["training"]["global_batch"] = 6
    (out / "run.json").write_text(json.dumps(record))
    code, said = call(*extend_arguments(inputs, out))
    assert code == 2 and "--global-batch 6" in said and "--overwrite" not in said


def test_a_damaged_result_is_made_again(
    finished: Path, inputs: Inputs, call: Cli, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    file = out / "clex.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, said = call(*extend_arguments(inputs, out))
    assert code == 2 and "is damaged" in said and "delete" in said
    (out / "clex_config.json").unlink()
    assert call(*extend_arguments(inputs, out))[0] == 0
    assert file.read_bytes() == whole


def test_half_a_line_in_the_log_stops_nothing(
    inputs: Inputs, call: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise OutputError("no space left")

    arguments = extend_arguments(inputs, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(clex.training, "save", stop)
        assert call(*arguments)[0] == 2
    log = tmp_path / "out" / "log.jsonl"
    log.write_text('{"step": 1, "sec')
    assert call(*arguments)[0] == 0
    assert (tmp_path / "out" / "results.json").is_file()


def test_interrupted_run_goes_on(
    finished: Path, inputs: Inputs, call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise OutputError("no space left")

    arguments = extend_arguments(inputs, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(clex.run, "evaluate_extended", stop)
        assert call(*arguments)[0] == 2
    with monkeypatch.context() as patch:
        # What was measured before training is not measured again.
        patch.setattr(clex.run, "evaluate_methods", stop)
        assert call(*arguments, "--resume")[0] == 0
    kept, wanted = (
        [row for row in read_rows(folder) if row["method"] != "clex"]
        for folder in (tmp_path / "out", finished)
    )
    assert kept == wanted
    assert len(read_rows(tmp_path / "out")) == len(read_rows(finished))


def test_overwrite(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(*extend_arguments(inputs, out))[0] == 0
    (out / "note.txt").write_text("of the earlier run")
    assert call(*extend_arguments(inputs, out, steps=1, overwrite=True))[0] == 0
    assert not (out / "note.txt").exists()
    assert len((out / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("depth", ["lora", "full"])
def test_other_depths(inputs: Inputs, call: Cli, tmp_path: Path, depth: str) -> None:
    out = tmp_path / "out"
    arguments = extend_arguments(inputs, out, train=depth, rivals="base", eval_lengths="64,256")
    assert call(*arguments)[0] == 0
    assert {r["length"] for r in read_rows(out)} == {64, 256}
    measured = tmp_path / "measured"
    code, said = call("eval", "ppl", out, "--data", inputs.data, "--out", measured)
    assert code == 0, said
    assert {r["method"] for r in read_rows(measured)} == {"base", "yarn", "clex"}


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_who_learns_on_sampled_positions(
    inputs: Inputs, call: Cli, tmp_path: Path, preset: str
) -> None:
    """The dynamics as released do, ours do not."""
    given = {"set": None, "train": "full", "rivals": "", "preset": preset}
    code, said = call(*extend_arguments(inputs, tmp_path / "out", **given))
    assert code == 0, said
    trained = clex.load(tmp_path / "out")
    start = clex.extend(load_base(inputs.model), config_of(trained))
    same = torch.equal(clex.frequencies(trained, 4), clex.frequencies(start, 4))
    assert same == (preset == "default")


def test_start(finished: Path, inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    arguments = extend_arguments(inputs, tmp_path / "out", train="full", start=finished, rate=0)
    assert call(*arguments, "--dynamics-rate", 0)[0] == 0
    started = clex.frequencies(clex.load(tmp_path / "out"), 4)
    assert torch.equal(started, clex.frequencies(clex.load(finished), 4))


def test_start_with_trained_weights(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    """Trained weights go along; the dynamics only where the method is the same."""
    twin, out = tmp_path / "twin", tmp_path / "out"
    closed = {"method": "yarn", "set": None, "train": "full", "rivals": ""}
    assert call(*extend_arguments(inputs, twin, **closed))[0] == 0
    arguments = extend_arguments(inputs, out, start=twin, rivals="base")
    code, said = call(*arguments)
    assert code == 0 and "base curve by loss on" not in said, said
    trained, plain, again = clex.load(twin), load_base(inputs.model), clex.load(out)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again.state_dict()[key], trained.state_dict()[key])
    assert not torch.equal(again.state_dict()[key], plain.state_dict()[key])
    assert config_of(again).method == "clex" and config_of(again).base == "yarn"
    # The row of the base is that of the model before any training.
    rows = {
        r["method"]: r for r in read_rows(out) if (r["length"], r["protocol"]) == (64, "window")
    }
    unstarted = tmp_path / "unstarted"
    assert call(*extend_arguments(inputs, unstarted, rivals="base", steps=1))[0] == 0
    assert rows["base"] in read_rows(unstarted)
    assert rows["clex"]["ppl"] != rows["base"]["ppl"]


@pytest.mark.parametrize(
    ("method", "base"), [("yarn", None), ("yarn", "linear"), ("none", None), ("none", "yarn")]
)
def test_start_with_an_adapter(
    inputs: Inputs, call: Cli, tmp_path: Path, method: str, base: str | None
) -> None:
    """The adapter goes along as it is, under dynamics that are fitted to it.

    They begin at the curve that the adapter has learned under, where it has one.
    """
    twin, out = tmp_path / "twin", tmp_path / "out"
    options = [] if method == "none" else ["--set", 'options={"beta_fast": 16.0}']
    closed = {"method": method, "set": None, "train": "lora", "rate": 1e-2, "rivals": ""}
    assert call(*extend_arguments(inputs, twin, **closed), *options)[0] == 0
    given = {} if base is None else {"base": base}
    code, said = call(*extend_arguments(inputs, out, start=twin, rivals="base", **given))
    assert code == 0, said
    assert ("base curve by loss on" in said) == (method == "none" and base is None)
    before, after = clex.load(twin), clex.load(out)
    theirs, ours = before.state_dict(), after.state_dict()
    adapter = [key for key in theirs if "lora_B" in key]
    assert adapter and all(theirs[key].any() for key in adapter)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if "lora_" in key)
    assert config_of(after).method == "clex" and not (out / "model.safetensors").exists()
    curves = [base] if base else ["yarn"] if method == "yarn" else CANDIDATES
    assert config_of(after).base in curves
    inherited = method == "yarn" and base is None
    assert config_of(after).options == ({"beta_fast": 16.0} if inherited else {})
    untrained = clex.extend(load_base(inputs.model), config_of(after))
    assert not torch.equal(clex.frequencies(after, 4), clex.frequencies(untrained, 4))
    # The row of the base is that of the model without the adapter, the last one has it.
    ids = tiny.make_ids(1, 40)
    assert torch.equal(tiny.logits(before, ids), tiny.logits(after, ids))
    rows = {
        r["method"]: r for r in read_rows(out) if (r["length"], r["protocol"]) == (64, "window")
    }
    assert rows["clex"]["ppl"] != rows["base"]["ppl"]


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_an_adapter_trained_on(inputs: Inputs, call: Cli, tmp_path: Path, rate: float) -> None:
    """The last stage on windows of true lengths, with a curve for each layer beside the adapter."""
    twin, out = tmp_path / "twin", tmp_path / "out"
    closed = {"method": "yarn", "set": None, "train": "lora", "rate": 1e-2, "rivals": ""}
    assert call(*extend_arguments(inputs, twin, **closed))[0] == 0
    given = {"train": "lora", "rate": rate, "rivals": "", "set": None, "per_layer": "curve"}
    code, said = call(*extend_arguments(inputs, out, start=twin, true_lengths=True, **given))
    assert code == 0, said
    before, after = clex.load(twin), clex.load(out)
    theirs, ours = before.state_dict(), after.state_dict()
    adapter = [key for key in theirs if "lora_" in key]
    same = [torch.equal(ours[key], theirs[key]) for key in adapter]
    assert adapter and (all(same) if rate == 0 else not any(same))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if "base_layer.weight" in k)
    # The dynamics learn in both.
    assert not torch.equal(clex.frequencies(after, 4), clex.frequencies(before, 4))
    assert read_about(out)["base_model"] == read_about(twin)["base_model"]


def test_starts_that_are_refused(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    assert call(*extend_arguments(inputs, adapter, train="lora", steps=1, rivals=""))[0] == 0
    code, said = call(*extend_arguments(inputs, tmp_path / "out", start=adapter, train="full"))
    assert code == 2 and "cannot be trained on at depth 'full'" in said
    given = extend_arguments(inputs, tmp_path / "out", start=adapter, train="lora", lora_rank=4)
    code, said = call(*given)
    assert code == 2 and "has rank 16, not 4" in said
    full = clex.extend(load_base(inputs.model), clex.ClexConfig(max_scale=4))
    clex.save(full, tmp_path / "full", base_model="another/model")
    code, said = call(*extend_arguments(inputs, tmp_path / "out", start=tmp_path / "full"))
    assert code == 2 and "was trained from 'another/model'" in said
    dynamics = clex.extend(load_base(inputs.model), clex.ClexConfig(max_scale=4))
    clex.save(dynamics, tmp_path / "dynamics", weights="none", base_model=str(inputs.model))
    given = {"start": tmp_path / "dynamics", "per_layer": "curve", "set": None}
    code, said = call(*extend_arguments(inputs, tmp_path / "out", **given))
    assert code == 2 and "has per_layer none, not curve" in said


def test_trained_method_beside_itself(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    """A closed form trained in full and the same without training are two rows."""
    changes = {"method": "yarn", "train": "full", "set": None, "rivals": "yarn"}
    code, said = call(*extend_arguments(inputs, tmp_path / "out", **changes))
    assert code == 0, said
    assert {row["method"] for row in read_rows(tmp_path / "out")} == {"yarn", "yarn, trained"}


def test_same_seed_same_result(inputs: Inputs, finished: Path, call: Cli, tmp_path: Path) -> None:
    """Whatever the program drew before: the seed is of everything that is drawn."""
    torch.manual_seed(1234)
    assert call(*extend_arguments(inputs, tmp_path / "out"))[0] == 0
    one, two = (folder / WEIGHTS_FILE for folder in (finished, tmp_path / "out"))
    assert one.read_bytes() == two.read_bytes()


# Measuring alone.


def test_eval_of_a_plain_model(finished: Path, inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    arguments = ("--data", inputs.data, "--out", tmp_path / "out", "--documents", 2)
    assert call("eval", "ppl", inputs.model, *arguments, "--max-scale", 2)[0] == 0
    rows = read_rows(tmp_path / "out")
    assert {r["method"] for r in rows} == {"base", "yarn"}
    assert {r["length"] for r in rows} == {16, 32, 64, 128}
    assert {r["documents"] for r in rows} == {2}
    assert all((tmp_path / "out" / name).is_file() for name in RESULTS)


def test_eval_of_an_extended_model(
    finished: Path, inputs: Inputs, call: Cli, tmp_path: Path
) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(inputs.data.read_text().splitlines()[9])
    assert call("eval", "ppl", finished, "--data", held_out, "--out", tmp_path / "out")[0] == 0
    assert read_rows(tmp_path / "out") == read_rows(finished)


def test_untrained_extension_is_the_base_in_its_window(inputs: Inputs) -> None:
    tokens = tiny.make_tokens([256, 300], vocab=256)
    plan = PerplexityPlan.for_model(64, 4.0)
    console = Console(file=io.StringIO())
    model = load_base(inputs.model)
    base = evaluate_methods(model, tokens, plan, {"base": None}, console)
    clex.extend(model, clex.ClexConfig(max_scale=4))
    ours = evaluate_extended(model, tokens, plan, console=console)
    for a, b in zip(base, ours, strict=True):
        assert (a.length, a.protocol, a.tokens) == (b.length, b.protocol, b.tokens)
        assert (a.nll == b.nll) == (a.length <= 64)


def test_bounds_of_perplexity(inputs: Inputs) -> None:
    """Both protocols by hand, from full logits."""
    tokens = tiny.make_tokens([256], vocab=256)
    plan = PerplexityPlan.for_model(64, 4.0)
    model = load_base(inputs.model)
    rows = evaluate_methods(model, tokens, plan, {"base": None}, Console(file=io.StringIO()))
    ids = torch.tensor(tokens["input_ids"][:])
    for row in rows:
        text = ids[:, : row.length] if row.protocol == "window" else ids[:, -row.length :]
        log_p = tiny.logits(model, text)[:, :-1].log_softmax(-1)
        nll = -log_p.gather(-1, text[:, 1:, None])[0, :, 0]
        scored = nll if row.protocol == "window" else nll[-plan.target :]
        assert row.tokens == len(scored)
        # float32 sums in another order.
        assert row.nll == pytest.approx(scored.mean().item(), rel=1e-5)


# Errors: exit code 2, one line, nothing written.


def short_documents(inputs: Inputs, folder: Path) -> dict[str, object]:
    return {"data": tiny.write_documents(folder / "short.jsonl", [200, 90, 80])}


def short_held_out(inputs: Inputs, folder: Path) -> dict[str, object]:
    return {"eval_data": tiny.write_documents(folder / "short.jsonl", [200])}


def empty_data(inputs: Inputs, folder: Path) -> dict[str, object]:
    (folder / "empty.txt").touch()
    return {"data": folder / "empty.txt"}


def save_start(model: Path, folder: Path) -> Path:
    extended = clex.extend(load_base(model), clex.ClexConfig(max_scale=4))
    return clex.save(extended, folder / "start", weights="none")


def other_start(inputs: Inputs, folder: Path) -> dict[str, object]:
    return {"start": save_start(inputs.other, folder)}


def damaged_start(inputs: Inputs, folder: Path) -> dict[str, object]:
    start = save_start(inputs.model, folder)
    (start / WEIGHTS_FILE).write_bytes(b"nothing")
    return {"start": start}


def given(**changes: object) -> Callable[[Inputs, Path], dict[str, object]]:
    return lambda inputs, folder: changes


ERRORS: dict[str, tuple[Callable[[Inputs, Path], dict[str, object]], str]] = {
    "unknown model": (given(model="tiny-lama"), "did you mean 'tiny-llama'"),
    "model without rotary": (
        lambda inputs, folder: {"model": inputs.gpt2, "native_length": 64},
        "GPT2LMHeadModel has no rotary module",
    ),
    "folder without a model": (
        lambda inputs, folder: {"model": folder},
        "is a folder without a config.json",
    ),
    "hub id, no network": (given(model="no/such"), "cannot load model 'no/such'"),
    "unknown method": (given(method="yarm", set=None), "did you mean 'yarn'"),
    "unknown rival": (given(rivals="base,yarm"), "did you mean 'yarn'"),
    "unknown setting": (given(set="widht=1"), "did you mean 'width'"),
    "unknown sampler": (given(positions="chunk"), "did you mean 'chunks'"),
    "nothing to train": (
        given(method="yarn", set=None),
        "method 'yarn' has nothing to train at depth 'dynamics'",
    ),
    "empty data": (empty_data, "no text in"),
    "no data": (given(data="nowhere.txt"), "no such file or folder"),
    "no field": (given(field="body"), "line 1: no text in field 'body'"),
    "short documents": (short_documents, "longest usable length is 200 tokens"),
    "short held-out text": (short_held_out, "longest usable length is 200 tokens"),
    "scale too small": (given(max_scale=0.5), "max_scale = 0.5 is out of range"),
    "scale of one": (given(max_scale=1), "max_scale must be above 1"),
    "scale too large": (given(max_scale=1e9), "out of range"),
    "scale is no number": (given(max_scale="nan"), "out of range"),
    "train length too small": (given(train_length=4), "train_length = 4 is out of range"),
    "train length too large": (
        given(train_length=257, train="full"),
        "train length 257 is above max_scale * native_length = 4 * 64 = 256",
    ),
    "no evaluation lengths": (given(eval_lengths="64,x"), "must be whole numbers"),
    "evaluation lengths too small": (given(eval_lengths="8"), "must be above the 15 target"),
    "no evaluation windows": (given(eval_windows=0), "windows"),
    "no documents to measure": (given(eval_documents=-1), "documents"),
    "batch of true lengths": (given(batch_size=2), "batch"),
    "no such device": (given(device="tpu9"), "device 'tpu9'"),
    "nothing to resume": (given(resume=True), "there is no run in"),
    "start without files": (given(start="nowhere"), f"no {CONFIG_FILE} in nowhere"),
    "start of another model": (other_start, "was made for another model"),
    "start that is damaged": (damaged_start, "is damaged"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors(kind: str, inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    prepare, words = ERRORS[kind]
    changes = prepare(inputs, tmp_path)
    out = tmp_path / "out"
    code, said = call(*extend_arguments(inputs, out, **changes))
    errors = [line for line in said.splitlines() if line.startswith("clex: ")]
    assert code == 2, said
    assert len(errors) == 1
    assert said.endswith(errors[0] + "\n")
    assert words in errors[0]
    assert not out.exists()


# The output folder.


@pytest.mark.parametrize("overwrite", [None, True])
def test_foreign_folder_is_left_alone(
    inputs: Inputs, call: Cli, tmp_path: Path, overwrite: bool | None
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    before = listing(tmp_path)
    code, said = call(*extend_arguments(inputs, tmp_path, overwrite=overwrite))
    assert code == 2
    assert "is not empty and was not written by clex extend" in said
    assert listing(tmp_path) == before


def test_file_in_place_of_a_folder(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    code, said = call(*extend_arguments(inputs, tmp_path / "out"))
    assert (code, "is a file, not a folder" in said) == (2, True)
    code, said = call(*extend_arguments(inputs, tmp_path / "out" / "below"))
    assert (code, "cannot write" in said) == (2, True)
    assert (tmp_path / "out").read_text() == "text"


def test_damaged_record(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    code, said = call(*extend_arguments(inputs, tmp_path))
    assert code == 2
    assert "run.json is damaged; pass --overwrite" in said


def test_folder_in_use(inputs: Inputs, call: Cli, tmp_path: Path) -> None:
    # A lock belongs to the open file, so that this process is as good as another one.
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = call(*extend_arguments(inputs, tmp_path))
        assert code == 2
        assert "another process is writing to" in said
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert call(*extend_arguments(inputs, tmp_path, steps=1, rivals="base"))[0] == 0


def test_resume_and_overwrite(inputs: Inputs, call: Cli, finished: Path) -> None:
    code, said = call(*extend_arguments(inputs, finished, resume=True, overwrite=True))
    assert code == 2
    assert "contradict" in said
    assert (finished / "results.json").is_file()


# The program itself.


def test_program_says_its_version() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from clex.cli import main; main()", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.strip() == f"clex {clex.__version__}"


def test_interrupt(
    inputs: Inputs, call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clex.run, "run_extend", interrupt)
    code, said = call(*extend_arguments(inputs, tmp_path / "out"))
    assert code == 130
    assert "the same command goes on" in said


def test_training_below_the_largest_scale_says_what_is_fitted(
    inputs: Inputs, tmp_path: Path
) -> None:
    """The result's learned part stays above it, and cannot be fitted there either."""

    def fit(out: str, **changes: Any) -> Path:
        start = changes.pop("start", None)
        run_extend(
            str(inputs.model),
            str(inputs.data),
            tmp_path / out,
            clex=clex.ClexConfig(max_scale=4, steps=4),
            training=TrainConfig(steps=1, accumulation=1, select_windows=1, **changes),
            evaluation=EvalConfig(lengths=(64,), documents=1, windows=1, rivals=()),
            start=start,
        )
        return tmp_path / out

    half = fit("half", max_scale=2)
    assert load_config(half).fitted_scale == 2
    assert load_config(fit("whole")).fitted_scale is None
    with pytest.raises(ConfigError, match="up to 4 are above fitted_scale 2"):
        fit("farther", start=half)
    assert load_config(fit("again", start=half, max_scale=2)).fitted_scale == 2
