"""Training: what moves, that it learns, and that an interruption costs nothing."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import clex
import tiny
from clex import training
from clex.data import Windows
from clex.errors import ClexError, ConfigError, DataError, TrainingError
from clex.hf.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from clex.hf.extend import require_extension
from clex.training import ExtensionTrainer, TrainConfig

TOKENS = tiny.make_tokens([300, 280, 270, 260])
DEPTHS = ("dynamics", "lora", "full")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are compared bit for bit, which a GPU does not promise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield


def make(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)  # of the field's first layer
    # Four steps of the solver take a quarter of the usual time and change nothing that is tested.
    config = clex.ClexConfig(max_scale=4, steps=4, **settings)
    return clex.extend(tiny.make_model(family), config)


def silent() -> Console:
    return Console(file=io.StringIO())


def run(folder: Path, model: Any = None, **settings: Any) -> Any:
    tokens = settings.pop("tokens", TOKENS)
    # What is learned counts here, and not whether it is any good: see test_selection.py.
    settings = {"steps": 4, "accumulation": 1, "save_every": 2, "select_windows": 0, **settings}
    return training.train(
        model or make(), tokens, TrainConfig(**settings), folder, console=silent()
    )


def read_log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def weights(model: Any) -> dict[str, Tensor]:
    """All numbers of a model by the names they had before any wrapping."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in model.named_parameters()
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# What moves.


@pytest.mark.parametrize(
    ("depth", "family"),
    [("dynamics", "llama"), ("lora", "llama"), ("lora", "gpt_neox"), ("full", "llama")],
)
def test_what_moves(tmp_path: Path, depth: str, family: str) -> None:
    model = make(family)
    before = weights(model)
    trained = run(tmp_path, model, depth=depth, rate=1e-3, dynamics_rate=1e-3)
    after = weights(trained)
    ours = {name for name in before if ".scalings." in name}
    changed = moved(before, after)
    assert ours <= changed
    if depth == "full":
        assert changed == set(before)
    else:
        assert changed == ours
    adapters = {name: tensor for name, tensor in after.items() if "lora_" in name}
    assert bool(adapters) == (depth == "lora")
    # B starts at zero.
    assert all(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)
    assert isinstance(trained, peft.PeftModel) == (depth == "lora")
    ids = tiny.make_ids(1, 200)
    loaded = clex.load(tmp_path, tiny.make_model(family) if depth != "full" else None)
    assert torch.equal(tiny.logits(loaded, ids), tiny.logits(trained, ids))
    assert not trained.training


@pytest.mark.parametrize("depth", ["lora", "full"])
@pytest.mark.parametrize("true_lengths", [False, True])
def test_dynamics_learn_from_windows_of_true_lengths(
    tmp_path: Path, depth: str, true_lengths: bool
) -> None:
    """On sampled positions they are held where nothing is said; weights move in both."""
    model = make()
    before = weights(model)
    changed = moved(before, weights(run(tmp_path, model, depth=depth, true_lengths=true_lengths)))
    ours = {name for name in before if ".scalings." in name}
    assert ours and changed & ours == (ours if true_lengths else set())
    assert bool(changed - ours) == (depth == "full")


@pytest.mark.parametrize("depth", ["lora", "full"])
def test_short_window_stays_where_only_dynamics_learn(tmp_path: Path, depth: str) -> None:
    ids = tiny.make_ids(1, tiny.NATIVE)
    plain = tiny.logits(tiny.make_model(), ids)
    assert torch.equal(tiny.logits(run(tmp_path / "a"), ids), plain)
    assert not torch.equal(tiny.logits(run(tmp_path / "b", depth=depth, rate=1e-3), ids), plain)


# That it learns.


@pytest.mark.parametrize(
    ("depth", "rate", "fall"),
    # A random model cannot do much with 12 numbers of dynamics; with all its weights it learns
    # 64 tokens by heart.
    [("dynamics", 0.0, 0.02), ("lora", 2e-2, 1.0), ("full", 3e-3, 2.0)],
)
def test_learns_one_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str, rate: float, fall: float
) -> None:
    get = Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda self, index: get(self, 1))
    run(tmp_path, depth=depth, rate=rate, steps=30, save_every=30, dynamics_rate=1e-2)
    losses = [record["loss"] for record in read_log(tmp_path)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - fall


def test_rate_zero_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get = Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda self, index: get(self, 1))
    run(tmp_path, depth="full", rate=0.0, dynamics_rate=0.0)
    losses = [record["loss"] for record in read_log(tmp_path)]
    assert max(losses) - min(losses) < 1e-6


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    def trained(name: str, **settings: Any) -> dict[str, Tensor]:
        return weights(run(tmp_path / name, depth="full", rate=1e-3, steps=2, **settings))

    one = trained("batch", batch_size=2)
    two = trained("accumulated", accumulation=2)
    for name in one:
        # Adam's first steps are rate * sign(gradient): where a gradient is near 0 its rounding may
        # turn the sign, so single entries differ by two rates, and their mean far less.
        assert (one[name] - two[name]).abs().mean() < 2e-5, name
    other = trained("half", batch_size=1)
    assert any((one[name] - other[name]).abs().mean() > 2e-4 for name in one)


def test_batch_of_true_lengths(tmp_path: Path) -> None:
    """Windows of different scales have different lengths and do not stack."""
    with pytest.raises(ClexError):
        run(tmp_path, batch_size=2)


@pytest.mark.parametrize("depth", ["dynamics", "full"])
def test_windows_of_true_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    """No positions are drawn; weights learn from every token, the dynamics alone from far ones."""
    seen: list[tuple[float, Any, int, Any]] = []
    at_scale, call = training.at_scale, training.TokenLoss.__call__

    def watch(model: Any, t: Any, positions: Any = None) -> Any:
        seen.append((float(t), positions, 0, None))
        return at_scale(model, t, positions)

    def count(self: Any, model: Any, input_ids: Tensor, **inputs: Any) -> Any:
        losses, logits = call(self, model, input_ids, **inputs)
        seen[-1] = (*seen[-1][:2], input_ids.shape[1], losses.detach())
        return losses, logits

    monkeypatch.setattr(training, "at_scale", watch)
    monkeypatch.setattr(training.TokenLoss, "__call__", count)
    before = weights(make())
    settings = {"true_lengths": True, "native_share": 0.25, "steps": 8, "end_weight": 0.3}
    after = weights(run(tmp_path, depth=depth, rate=1e-3, dynamics_rate=1e-3, **settings))
    assert all("scalings" in name for name in moved(before, after)) == (depth == "dynamics")
    assert any("scalings" in name for name in moved(before, after))
    assert {t for t, *_ in seen} > {1.0}
    for (t, positions, n, losses), record in zip(seen, read_log(tmp_path), strict=True):
        assert positions is None
        assert n == pytest.approx(tiny.NATIVE * (t * 1.03125 if t > 1 else 1), abs=1)
        scored = n - 1 if depth == "full" else max(n - tiny.NATIVE, tiny.NATIVE // 2)
        assert losses.shape == (1, scored)
        expected = 0.7 * losses.mean() + 0.3 * losses[:, -tiny.NATIVE // 2 :].mean()
        assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"depth": "full", "train_length": 48, "true_lengths": True}, "not both"),
        ({"depth": "full", "true_lengths": "yes"}, "true or false"),
        ({"depth": "full", "true_lengths": True, "select_windows": 2}, "at depth full"),
    ],
)
def test_true_lengths_that_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**settings)


def test_true_lengths_are_for_frozen_weights_if_nothing_is_said() -> None:
    assert TrainConfig().true_lengths and not TrainConfig(train_length=48).true_lengths
    assert not TrainConfig(depth="full").true_lengths
    assert TrainConfig().end_weight == 0.5 and TrainConfig(depth="full").end_weight == 0


@pytest.mark.parametrize("depth", ["lora", "full"])
def test_true_lengths_are_the_end_of_a_training(depth: str) -> None:
    """Few steps at low rates for the weights, and the rate of a fit for the dynamics."""
    last, first = TrainConfig(depth=depth, true_lengths=True), TrainConfig(depth=depth)
    assert (last.steps, last.windows_per_step, last.rate) == (2, 2, 3e-5)
    assert last.dynamics_rate == TrainConfig().dynamics_rate == 3e-3
    assert (last.end_weight, first.end_weight) == (0.3, 0.0)
    assert first.steps > 50 * last.steps and first.rate > 5 * last.rate
    assert (last.scale_power, last.native_share) == (first.scale_power, first.native_share)
    assert TrainConfig(depth=depth, true_lengths=True, steps=9, rate=1e-4).steps == 9


@pytest.mark.parametrize("depth", ["dynamics", "full"])
def test_paper_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str) -> None:
    seen: list[tuple[Any, Any]] = []
    at_scale = training.at_scale

    def watch(model: Any, t: Any, positions: Any = None) -> Any:
        seen.append((t, positions))
        return at_scale(model, t, positions)

    monkeypatch.setattr(training, "at_scale", watch)
    model = make(preset="paper")
    sampler: dict[str, Any] = {"native_share": 0.0, "scale_power": 1.0, "span_margin": 0.0}
    run(tmp_path, model, depth=depth, rate=1e-3, train_length=48, steps=6, **sampler)
    scales = [float(t) for t, _ in seen]
    assert len(scales) == 6
    assert set(scales) <= {1.0, 2.0, 3.0, 4.0}
    assert max(scales) > 1
    for t, positions in seen:
        steps = positions.diff()
        assert positions.shape == (1, 48)
        assert (steps >= 1).all()
        assert positions.max() == (t * tiny.NATIVE - 1 if t > 1 else 47)
        assert (steps > 1).sum() > 10 or t <= 1  # a random subset, not a few chunks
    assert require_extension(model).scalings["all"].field.down.weight.any()


def test_packed_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    call = training.TokenLoss.__call__

    def watch(self: Any, model: Any, input_ids: Tensor, **inputs: Any) -> Any:
        seen.append(inputs["position_ids"])
        return call(self, model, input_ids, **inputs)

    monkeypatch.setattr(training.TokenLoss, "__call__", watch)
    tokens = tiny.make_tokens([30, 20, 40, 25, 50])
    run(tmp_path, depth="full", rate=1e-3, tokens=tokens)
    assert len(seen) == 4
    assert all((ids[:, 1:] == 0).sum() >= 1 for ids in seen)
    assert all(record["loss"] > 0 for record in read_log(tmp_path))


def drawn_positions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, positions: str, **settings: Any
) -> dict[int, tuple[float, Tensor]]:
    """Scale and positions of every row of a run, by the row's seed."""
    rows: dict[int, tuple[float, Tensor]] = {}
    draw = training.sample_positions

    def watch(name: str, n: int, t: Tensor, seeds: Tensor, native: int, most: float) -> Tensor:
        table = draw(name, n, t, seeds, native, most)
        assert (name, most) == (positions, 4 * (1 + settings.get("span_margin", 0.25)))
        rows.update(zip(seeds.tolist(), zip(t.tolist(), table, strict=True), strict=True))
        return table

    monkeypatch.setattr(training, "sample_positions", watch)
    run(folder, make(positions=positions), depth="full", rate=1e-3, **settings)
    monkeypatch.undo()
    return rows


def test_positions_do_not_depend_on_the_batching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = "chunks:2,random:1,contiguous:0.5"
    shapes = [(4, 1), (2, 2), (1, 4)]
    runs = [
        drawn_positions(
            tmp_path / f"{size}", monkeypatch, mixture, steps=2, batch_size=size, accumulation=count
        )
        for size, count in shapes
    ]
    assert [len(rows) for rows in runs] == [8, 8, 8]
    for rows in runs[1:]:
        assert rows.keys() == runs[0].keys()
        assert all(rows[k][0] == t for k, (t, _) in runs[0].items())
        assert all(torch.equal(rows[k][1], table) for k, (_, table) in runs[0].items())


def test_curriculum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"steps": 8, "native_share": 0.0, "span_margin": 0.0}
    rising = drawn_positions(tmp_path / "a", monkeypatch, "chunks", curriculum=0.75, **settings)
    steady = drawn_positions(tmp_path / "b", monkeypatch, "chunks", **settings)
    scales = [[rows[k][0] for k in sorted(rows)] for rows in (rising, steady)]
    limits = [2 * 2 ** (i / 6) for i in range(6)] + [4, 4]
    assert all(t <= most for t, most in zip(scales[0], limits, strict=True))
    assert any(t > most for t, most in zip(scales[1], limits, strict=True))
    assert scales[0][6:] == scales[1][6:]


def test_sampled_positions_reach_farther_by_the_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The "random" sampler fills its span: t or 1.25 t times the window."""
    settings: dict[str, Any] = {"steps": 8, "native_share": 0.25}
    for name, margin in (("a", 0.0), ("b", 0.25)):
        rows = drawn_positions(
            tmp_path / name, monkeypatch, "random", span_margin=margin, **settings
        )
        # The scales that are handed to the sampler are those of the span.
        spans = [table[-1].item() + 1 for _, table in rows.values()]
        scales = [training.Windows(TOKENS, plan(margin), 8, 0)[i]["scale"] for i in range(8)]
        wanted = [tiny.NATIVE * (t * (1 + margin) if t > 1 else 1) for t in scales]
        assert sorted(spans) == pytest.approx(sorted(map(round, wanted)), abs=1)
    assert max(spans) > 4 * tiny.NATIVE


def plan(margin: float) -> Any:
    config = TrainConfig(depth="full", steps=8, native_share=0.25, span_margin=margin)
    return training.check_plan(training.config_of(make(positions="random")), config, TOKENS)


@pytest.mark.parametrize(("power", "mean"), [(1.0, 2.5), (2.0, 3.0), (0.5, 2.0)])
def test_larger_scales_more_often(power: float, mean: float) -> None:
    """The mean of 1 + 3 u^(1/p) for uniform u is 1 + 3 p/(p+1)."""
    config = TrainConfig(depth="full", native_share=0.0, scale_power=power)
    drawn = training.check_plan(training.config_of(make()), config, TOKENS)
    scales = [drawn.scale(i, seed=5) for i in range(2000)]
    assert min(scales) >= 1 and max(scales) <= 4
    assert sum(scales) / len(scales) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("depth", ["dynamics", "lora", "full"])
def test_where_weights_train_the_end_of_the_range_is_drawn_more_often(depth: str) -> None:
    config, given = (
        TrainConfig(depth=depth, **changes)
        for changes in ({}, {"scale_power": 1.0, "span_margin": 0.0})
    )
    assert (given.scale_power, given.span_margin) == (1, 0)
    wanted = (1, 0) if depth == "dynamics" else (2, 0.25)
    assert (config.scale_power, config.span_margin) == wanted


def test_curriculum_counts_the_items_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = training.config_of(make())
    config = TrainConfig(depth="full", steps=10, batch_size=2, accumulation=3, curriculum=0.5)
    assert training.check_plan(extension, config, TOKENS).rising == 30
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert training.check_plan(extension, config, TOKENS).rising == 120
    assert training.check_plan(extension, TrainConfig(depth="full"), TOKENS).rising == 0


def test_post_operations_train(tmp_path: Path) -> None:
    model = make(post=("clip", "resonance"))
    before = weights(model)
    run(tmp_path, model)
    assert any("scalings" in name for name in moved(before, weights(model)))
    loaded = clex.load(tmp_path, model=tiny.make_model())
    for t in (1.0, 3.0):
        assert torch.equal(clex.frequencies(loaded, t), clex.frequencies(model, t))
    assert clex.frequencies(loaded, 3.0)[-1] == 0 < clex.frequencies(loaded, 1.0)[-1]


# Interruptions.


class Killed(BaseException):
    """Stands for what no `except Exception` catches."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in the middle of a step, without a word."""
    compute = ExtensionTrainer.compute_loss

    def stop(self: Any, *args: Any, **inputs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return compute(self, *args, **inputs)

    monkeypatch.setattr(ExtensionTrainer, "compute_loss", stop)


@pytest.mark.parametrize("depth", DEPTHS)
def test_killed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    settings: dict[str, Any] = {"depth": depth, "rate": 1e-3, "steps": 4, "save_every": 2}
    settings["dynamics_rate"] = 1e-3

    whole = run(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(3, patch)
        run(tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / CONFIG_FILE).exists()
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-2").is_dir()
    resumed = run(tmp_path / "cut", **settings)
    files = (tmp_path / name / WEIGHTS_FILE for name in ("whole", "cut"))
    assert len({file.read_bytes() for file in files}) == 1
    assert moved(weights(whole), weights(resumed)) == set()
    steps = [record["step"] for record in read_log(tmp_path / "cut")]
    assert steps[-2:] == [3, 4]
    assert steps.count(2) == 1  # went on from step 2, not from the start
    # Every step counts: the checkpoint in the middle is not the end.
    middle = load_file(tmp_path / "cut" / "checkpoints" / "checkpoint-2" / WEIGHTS_FILE)
    end = load_file(tmp_path / "cut" / WEIGHTS_FILE)
    assert moved(middle, end)


def test_unfinished_checkpoint_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", steps=5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        run(tmp_path / "cut", steps=5)
    last = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    (last / "complete.json").unlink()
    (last / "optimizer.pt").write_bytes(b"half")
    run(tmp_path / "cut", steps=5)
    steps = [record["step"] for record in read_log(tmp_path / "cut")]
    assert steps == [1, 2, 3, 4, 3, 4, 5]  # from step 2
    files = (tmp_path / name / WEIGHTS_FILE for name in ("whole", "cut"))
    assert len({file.read_bytes() for file in files}) == 1


def test_sigkill_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, value: Any) -> None:
        if path.name == "complete.json" and value["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, value)

    write_json = training.write_json
    run(tmp_path / "whole", steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", die)
        # A fork, because a new interpreter would spend ten seconds on imports.
        process = multiprocessing.get_context("fork").Process(
            target=run, args=(tmp_path / "cut",), kwargs={"steps": 5}
        )
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / WEIGHTS_FILE).is_file()
    run(tmp_path / "cut", steps=5)
    steps = [record["step"] for record in read_log(tmp_path / "cut")]
    assert steps == [1, 2, 3, 4, 3, 4, 5]
    files = (tmp_path / name / WEIGHTS_FILE for name in ("whole", "cut"))
    assert len({file.read_bytes() for file in files}) == 1


def test_kill_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(1, patch)
        run(tmp_path / "cut")
    run(tmp_path / "cut")
    files = (tmp_path / name / WEIGHTS_FILE for name in ("whole", "cut"))
    assert len({file.read_bytes() for file in files}) == 1


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    shutil.copy(tmp_path / "log.jsonl", tmp_path / "before")
    run(tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "before").read_text()


def test_seed_decides_everything(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
        files.append((tmp_path / name / WEIGHTS_FILE).read_bytes())
    assert files[0] == files[1] != files[2]


def test_adapters_start_from_the_seed(tmp_path: Path) -> None:
    """Whatever the program drew before."""
    files = []
    for name in ("a", "b"):
        model = make()
        torch.rand(len(files) + 1)
        run(tmp_path / name, model, depth="lora", seed=1, rate=1e-3)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


# A loss that is no number.


def poison_losses(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the forward pass number `at`, from 1, is not a number."""
    call, count = training.TokenLoss.__call__, 0

    def bad(self: Any, *args: Any, **inputs: Any) -> Any:
        nonlocal count
        count += 1
        losses, hits = call(self, *args, **inputs)
        return (losses * float("nan") if count == at else losses), hits

    monkeypatch.setattr(training.TokenLoss, "__call__", bad)


# At the first step, between checkpoints, where one is due, and at the end.
@pytest.mark.parametrize(("step", "good"), [(1, None), (3, 2), (4, 2), (5, 4)])
def test_nan_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, good: int | None
) -> None:
    poison_losses(step, monkeypatch)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, steps=5)
    message = str(caught.value)
    assert f"not a number at step {step};" in message
    assert "\n" not in message
    assert not (tmp_path / CONFIG_FILE).exists()
    folders = sorted(p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*"))
    if good is None:
        assert "no checkpoint yet" in message
        assert folders == []
        return
    assert f"checkpoint-{good}" in message
    assert folders[-1] == f"checkpoint-{good}"
    state = load_file(tmp_path / "checkpoints" / folders[-1] / WEIGHTS_FILE)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_nan_loss_with_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_losses(5, monkeypatch)  # the first half of step 3
    with pytest.raises(TrainingError, match="not a number at step 3;"):
        run(tmp_path, steps=6, accumulation=2)


def test_nan_gradient_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step may be a number and its gradient none."""
    step = ExtensionTrainer.training_step

    def bad(self: Any, *args: Any, **inputs: Any) -> Any:
        loss = step(self, *args, **inputs)
        if self.state.global_step == 3:
            for parameter in require_extension(self.extended).scalings.parameters():
                parameter.grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(ExtensionTrainer, "training_step", bad)
    with pytest.raises(TrainingError, match="checkpoint-2"):
        run(tmp_path, steps=6)
    state = load_file(tmp_path / "checkpoints" / "checkpoint-2" / WEIGHTS_FILE)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_terminal_is_given_back_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_losses(1, monkeypatch)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    with pytest.raises(TrainingError):
        settings = TrainConfig(steps=3, select_windows=0)
        training.train(make(), TOKENS, settings, tmp_path, console=console)
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().count(hide) == screen.getvalue().count(show) == 1


# What is refused before anything is written.


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"train_length": 257}, ConfigError, r"train length 257 is above .* 4 \* 64 = 256"),
        ({"positions": "chunks:1,rand:1"}, ConfigError, "did you mean 'random'"),
        ({"max_scale": 8.0}, ConfigError, "training scales 1 to 8 must lie between 1 and"),
        ({"min_scale": 3.0, "max_scale": 2.0}, ConfigError, "training scales 3 to 2"),
        ({"tokens": tiny.make_tokens([255, 100])}, DataError, "longest usable length is 255"),
    ],
)
def test_plans_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[ClexError], words: str
) -> None:
    positions = {name: settings.pop(name) for name in ("positions",) if name in settings}
    with pytest.raises(error, match=words):
        run(tmp_path / "out", make(**positions), **settings)
    assert not (tmp_path / "out").exists()


def test_nothing_to_train(tmp_path: Path) -> None:
    model = clex.extend(tiny.make_model(), clex.ClexConfig(method="yarn", max_scale=4))
    with pytest.raises(ConfigError, match="nothing to train at depth 'dynamics'"):
        run(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", model, depth="full", rate=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"depth": "lorra"}, "did you mean 'lora'"),
    ({"precision": "fp16"}, "unknown precision 'fp16'"),
    ({"steps": 0}, "steps = 0 is out of range"),
    ({"rate": float("nan")}, "rate = nan is out of range"),
    ({"native_share": 1.5}, "native_share = 1.5 is out of range"),
    ({"curriculum": -0.1}, "curriculum = -0.1 is out of range"),
    ({"train_length": 4}, "train_length = 4 is out of range"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


def test_checkpointing_of_activations_changes_nothing(tmp_path: Path) -> None:
    def trained(how: str) -> bytes:
        run(tmp_path / how, depth="full", rate=1e-3, checkpointing=how)
        return (tmp_path / how / WEIGHTS_FILE).read_bytes()

    assert trained("on") == trained("off")


# What is written down.


def test_frequencies_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EVERY", 3)
    model = run(tmp_path, steps=7, save_every=7, dynamics_rate=1e-2)
    records = read_log(tmp_path)
    logged = {r["step"]: r for r in records if any(key.startswith("frequency/") for key in r)}
    assert list(logged) == [1, 3, 6, 7]
    one, four = (clex.frequencies(model, t) for t in (1.0, 4.0))
    for dim in (0, 2, 4, 5, 7):  # of 8 pairs
        key = f"frequency/t4/dim{dim}"
        assert logged[7][key] == pytest.approx((four[dim] / one[dim]).item(), rel=1e-6)
    assert logged[7]["frequency/t4/dim7"] != logged[1]["frequency/t4/dim7"]
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_closed_forms_have_no_curve_of_frequencies(tmp_path: Path) -> None:
    yarn = clex.extend(tiny.make_model(), clex.ClexConfig(method="yarn", max_scale=4))
    run(tmp_path, yarn, depth="full", rate=1e-3)
    assert not any(key.startswith("frequency/") for r in read_log(tmp_path) for key in r)


def test_unknown_integration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        run(tmp_path, report_to=("tensorbord",))


def test_tensorboard(tmp_path: Path) -> None:
    """By default where it is installed, without it when told so."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path / "with")
    found = events.EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]
    assert {"train/loss", "train/frequency/t4/dim7"} <= set(tags)
    losses = [record["loss"] for record in read_log(tmp_path / "with")]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses)
    run(tmp_path / "without", report_to=("none",))
    assert not (tmp_path / "without" / "tensorboard").exists()


# Compiled layers.


def test_runs_share_their_compiled_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses, one graph for all layers of both runs, and models that are plain after."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        GradientCheckpointingLayer,
        "compile",
        lambda self, **options: nn.Module.compile(self, backend=backend, **options),
    )
    torch.compiler.reset()
    settings = {"depth": "full", "train_length": 64, "batch_size": 2, "steps": 2}
    run(tmp_path / "eager", make(), **settings)
    assert not graphs
    for name in ("first", "second"):
        model = run(tmp_path / name, make(), **settings, compile=True)
        losses = [[r["loss"] for r in read_log(tmp_path / folder)] for folder in (name, "eager")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(graphs) == 1
    tiny.logits(model, tiny.make_ids(1, 40))
    run(tmp_path / "true", compile=True)  # windows of all lengths
    assert len(graphs) == 1
