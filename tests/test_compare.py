"""Comparisons: what a recipe may say, equal budget, failures, going on, and the numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import tiny
from clex import cli
from clex.comparison import runner
from clex.comparison.plan import make_plan
from clex.comparison.recipe import Recipe, parse_recipe, read_recipe, with_changes
from clex.comparison.runner import run_compare
from clex.comparison.statistics import Losses, level
from clex.config import ClexConfig
from clex.data import load_tokens
from clex.errors import ConfigError, OutputError, TrainingError
from clex.evaluation import longppl
from clex.evaluation.perplexity import PerplexityPlan, as_method, evaluate_methods
from clex.hf.checkpoint import load
from clex.hf.extend import config_of, extend, frequencies
from clex.hf.models import load_base, load_tokenizer
from clex.scaling import get_scaling
from clex.scaling.base import parse_options

QUICK = Path(__file__).parent.parent / "recipes" / "quick.toml"

RECIPE = """
model = "model"
data = "data.jsonl"
eval_data = "test.jsonl"
max_scale = 4
[budget]
depth = "full"
steps = 3
batch_size = 2
train_length = 64
rate = 1e-3
save_every = 1
[evaluation]
documents = 5
[evaluation.passkey]
lengths = [200]
depths = [0, 1]
needles = 1
distractors = 2
generate = false
[methods.plain]
label = "plain fine-tuning"
method = "none"
positions = "contiguous"
[methods.plain-yarn]
weights = "plain"
method = "yarn"
[methods.free]
train = false
method = "yarn"
[methods.chunks]
method = "yarn"
"""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, texts and the recipe above."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_model(folder / "model")
    tiny.write_documents(folder / "data.jsonl", [290 + 3 * i for i in range(6)])
    tiny.write_documents(folder / "test.jsonl", [260 + 5 * i for i in range(5)])
    (folder / "recipe.toml").write_text(RECIPE)
    with tiny.token_cache(folder / "cache"):
        yield folder


def compare(inputs: Path, out: Path, text: str = RECIPE, **options: Any) -> list[str]:
    """Run a recipe that lies beside its model and texts."""
    recipe = inputs / "recipe.toml"
    recipe.write_text(text)
    console = Console(file=options.pop("file", io.StringIO()), width=200)
    return run_compare(recipe, out, console=console, device="cpu", **options)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def cell(found: dict[str, Any], method: str, protocol: str, length: int) -> dict[str, Any]:
    (one,) = (
        c
        for c in found["perplexity"]
        if (c["method"], c["protocol"], c["length"]) == (method, protocol, length)
    )
    return dict(one)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe above, run from end to end."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert compare(inputs, out) == []
    return out


# What a recipe may say.


def parse(text: str) -> Recipe:
    import tomllib

    return parse_recipe(tomllib.loads(text), text, Path())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('model = "model"', 'modle = "model"', "the recipe: unknown key 'modle'; did you mean 'mo"),
        ('model = "model"', "", "the recipe: model is missing"),
        ("max_scale = 4", 'max_scale = "4"', "max_scale must be a number, not '4'"),
        ("max_scale = 4", "max_scale = 4\nseeds = []", "seeds must be one or more"),
        ("max_scale = 4", "max_scale = 4\nseeds = [1, 1]", "seeds must be one or more"),
        ("max_scale = 4", 'max_scale = 4\nseeds = ["a"]', "seeds must be a whole number, not 'a'"),
        ("max_scale = 4", 'max_scale = 4\nreference = "yarn"', "unknown reference 'yarn'"),
        ("steps = 3", "step = 3", "[budget]: unknown key 'step'; did you mean 'steps'"),
        ("steps = 3", "steps = 3.5", "[budget]: steps must be a whole number, not 3.5"),
        ("steps = 3", "steps = 0", "[budget]: steps = 0 is out of range"),
        ('depth = "full"', 'depth = "fulll"', "[budget]: unknown training depth 'fulll'"),
        (
            "documents = 5",
            "documents = 0",
            "[evaluation]: documents must be from 1 to 65536, not 0",
        ),
        ("documents = 5", "document = 5", "[evaluation]: unknown key 'document'"),
        ("needles = 1", "needle = 1", "[evaluation.passkey]: unknown key 'needle'"),
        ("[methods.chunks]\n", "[methods.base]\n", "[methods.base]: 'base' is the model as it is"),
        ("[methods.chunks]\n", '[methods."a b"]\n', "a method's name is made of up to 100 letters"),
        ("[methods.chunks]\nmethod", "[methods.chunks]\nmehtod", "unknown key 'mehtod'"),
        ('[methods.chunks]\nmethod = "yarn"', "[methods.chunks]", "has no method"),
        ("[methods.chunks]", "[methods.chunks]\nbase = 'auto'", "base belongs to method 'clex'"),
        ("[methods.chunks]", "[methods.chunks]\nclex = {widht = 1}", "unknown key 'widht'"),
        ("[methods.chunks]", "[methods.chunks]\nclex = {width = 1}", "belongs to method 'clex'"),
        ("[methods.chunks]", "[methods.chunks]\ntraining = {seed = 1}", "unknown key 'seed'"),
        ('weights = "plain"', 'weights = "chunks"', "must be a trained method above it"),
        ('weights = "plain"', 'weights = "plian"', "must be a trained method above it"),
        ("train = false", "train = false\ntraining = {curriculum = 0.5}", "is not trained"),
        ("[methods.chunks]", "[methods.chunks]\nstart = 'plain'", 'say so: deviates = "..."'),
        ("[methods.plain]", "[methods.plain]\nmeasure = false", "'plain' has measure = false"),
    ],
)
def test_recipe_errors(before: str, after: str, message: str) -> None:
    assert before in RECIPE
    with pytest.raises(ConfigError) as caught:
        parse(RECIPE.replace(before, after))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        read_recipe(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("model = [")
    with pytest.raises(ConfigError, match="cannot read recipe"):
        read_recipe(tmp_path / "bad.toml")


def test_the_quick_recipe() -> None:
    recipe = read_recipe(QUICK)
    assert recipe.model == "tiny-llama" and len(recipe.methods) == 5
    assert "/" not in QUICK.read_text().split("[methods")[0].replace("recipes/quick.toml", "")
    assert all(method.deviates is None for method in recipe.methods)
    assert Path(recipe.data).is_file() and recipe.eval_data and Path(recipe.eval_data).is_file()
    assert recipe.data != recipe.eval_data


def test_the_shipped_recipes() -> None:
    """All can be read, and two stages together get the tokens of one."""
    recipes = {path.stem: read_recipe(path) for path in QUICK.parent.glob("*.toml")}
    assert len(recipes) == 11
    results = QUICK.parent.parent / "benchmarks" / "results"
    measured = {path.stem: read_recipe(path) for path in results.glob("*.toml")}
    assert len(measured) > 5
    for name, recipe in [*recipes.items(), *measured.items()]:
        for method in recipe.methods:
            form = method.clex.base if method.clex.method == "clex" else method.clex.method
            assert parse_options(form, get_scaling(form).Options, method.clex.options), name
    for name, native, part in (
        ("smollm2-core", 8192, "twin-most"),
        ("smollm2-main", 8192, "twin-most"),
        ("tiny-core", 256, "twin-short"),
    ):
        recipe = recipes[name]
        whole, first = (recipe.training(recipe.method(m), 0) for m in ("twin", part))
        after = recipe.training(recipe.method("twin-then-layers"), 0)
        tokens = whole.steps * whole.windows_per_step * native
        # A share of the range drawn with a density that grows as (t - 1)^(power - 1).
        drawn = after.scale_power / (1 + after.scale_power)
        mean = native * (1 + ((after.max_scale or recipe.max_scale) - 1) * drawn)
        second = after.steps * after.windows_per_step * mean * (1 + after.margin)
        assert first.steps * first.windows_per_step * native + second == pytest.approx(
            tokens, rel=0.02
        )
        if name != "smollm2-main":  # one curve for all layers gets the same
            assert recipe.training(recipe.method("twin-then-dynamics"), 0) == after
        if name == "tiny-core":  # and the other order has the same parts
            assert recipe.training(recipe.method("layers"), 0) == after
            last = recipe.training(recipe.method("layers-then-weights"), 0)
            assert last == replace(first, dynamics_rate=0)
    main, core = recipes["smollm2-main"], recipes["smollm2-core"]
    same = {m.name: m for m in core.methods}
    # Parts of one can be joined with parts of the other.
    assert main.budget == core.budget and main.evaluation == core.evaluation
    assert all(same.get(m.name, m) == m for m in main.methods)


# Equal budget.


@pytest.mark.parametrize("change", ["steps = 4", "rate = 1e-2", 'depth = "lora"', "batch_size = 1"])
def test_another_budget_must_be_admitted(change: str) -> None:
    text = RECIPE + f"training = {{ {change} }}\n"
    name = change.split()[0]
    with pytest.raises(ConfigError, match=rf"\[methods.chunks\] training changes {name}"):
        parse(text)
    admitted = parse(text + 'deviates = "to see what it does"\n').method("chunks")
    assert admitted.deviates == "to see what it does"
    # How the budget is spent is a method's own business.
    assert parse(RECIPE + "training = { curriculum = 0.5 }\n").method("chunks").deviates is None


def test_windows_of_other_lengths_are_another_budget(inputs: Path) -> None:
    """At depth dynamics the windows follow the scale, so that even `margin` changes the tokens."""
    text = RECIPE.replace('depth = "full"', 'depth = "dynamics"').replace("batch_size = 2", "")
    text = text.replace("train_length = 64\n", "").replace("rate = 1e-3\n", "")
    text = text[: text.index("[methods.plain]")]
    text += '[methods.a]\nmethod = "clex"\n[methods.b]\nmethod = "clex"\n'

    def plan(more: str) -> Any:
        (inputs / "lengths.toml").write_text(text + more)
        return make_plan(read_recipe(inputs / "lengths.toml"))

    jobs = {job.method.name: job for job in plan("").jobs}
    assert jobs["a"].tokens == jobs["b"].tokens > 3 * 64
    with pytest.raises(ConfigError, match=r"\[methods.b\] would train on .* tokens in windows of"):
        plan("training = { margin = 0.0 }\n")
    jobs = {
        job.method.name: job
        for job in plan('training = { margin = 0.0 }\ndeviates = "no margin"\n').jobs
    }
    assert jobs["a"].tokens > jobs["b"].tokens
    with pytest.raises(ConfigError, match="'yarn' has nothing to train at depth 'dynamics'"):
        plan('[methods.c]\nmethod = "yarn"\n')


def test_equal_tokens_in_equal_order(finished: Path) -> None:
    settings = [
        json.loads((finished / f"runs/{name}/seed-0/model/run.json").read_text())["settings"]
        for name in ("plain", "chunks")
    ]
    assert settings[0]["training"] == settings[1]["training"]
    methods = {m["name"]: m for m in results(finished)["methods"]}
    assert methods["plain"]["tokens"] == methods["chunks"]["tokens"] == 3 * 2 * 64
    assert methods["free"]["tokens"] == methods["plain-yarn"]["tokens"] == 0


def test_one_native_judge_for_all_methods(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key tokens are those of the plain model in windows of 64 tokens, found once."""
    monkeypatch.setattr(longppl, "GAIN", 0.01)
    monkeypatch.setattr(longppl, "MOST_LOSS", 9.0)
    windows: list[int | None] = []
    find = longppl.find_key_tokens

    def spy(read: Any, ids: Any, truncation: int, window: int | None = None) -> Any:
        assert not read.extended and len(ids) > 64 == window
        windows.append(window)
        return find(read, ids, truncation, window)

    monkeypatch.setattr(longppl, "find_key_tokens", spy)
    text = RECIPE[: RECIPE.index("[evaluation.passkey]")] + (
        'protocols = ["longppl"]\nevaluator = "native"\ntruncation = 16\n'
        '[methods.free]\ntrain = false\nmethod = "yarn"\n'
    )
    assert compare(inputs, tmp_path / "out", text) == []
    assert len(windows) == 5
    base, free = (cell(results(tmp_path / "out"), m, "longppl", 256) for m in ("base", "free"))
    assert base["tokens"] == free["tokens"] > 0
    assert base["ppl"] != free["ppl"]


STAGES = (
    RECIPE[: RECIPE.index("[evaluation.passkey]")]
    + """
protocols = ["target"]
[methods.twin]
method = "critical_ntk"
[methods.then-dynamics]
method = "clex"
start = "twin"
training = { depth = "dynamics", batch_size = 1, accumulation = 1, dynamics_rate = 0.05 }
deviates = "dynamics alone, after the twin"
[methods.dynamics]
method = "clex"
training = { depth = "dynamics", batch_size = 1, accumulation = 1, dynamics_rate = 0.05 }
deviates = "dynamics alone"
[methods.then-weights]
method = "clex"
start = "dynamics"
training = { dynamics_rate = 0 }
deviates = "from fitted dynamics, which stay"
"""
)


def test_two_stages(inputs: Path, tmp_path: Path) -> None:
    """Weights first and then the dynamics alone, and the other way round."""
    assert compare(inputs, tmp_path / "out", STAGES) == []

    def model(name: str) -> Any:
        return load(tmp_path / f"out/runs/{name}/seed-0/model")

    def weights(one: Any) -> dict[str, torch.Tensor]:
        return {k: v for k, v in one.state_dict().items() if ".scalings." not in k}

    def same(a: Any, b: Any) -> bool:
        return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())

    plain, twin = load_base(inputs / "model"), model("twin")
    assert not same(plain, twin)
    ntk = frequencies(extend(load_base(inputs / "model"), ClexConfig(method="critical_ntk")), 4)
    after, fitted, last = model("then-dynamics"), model("dynamics"), model("then-weights")
    # The dynamics began at the twin's own curve, moved from it, and its weights stayed.
    assert same(after, twin) and config_of(after).base == "critical_ntk"
    assert not torch.equal(frequencies(after, 4), ntk)
    assert torch.equal(frequencies(twin, 4), ntk)
    assert same(fitted, plain) and not same(last, plain)
    assert torch.equal(frequencies(last, 4), frequencies(fitted, 4))
    # The result needs neither the folder it started from nor the plain model.
    assert (tmp_path / "out/runs/then-dynamics/seed-0/model/model.safetensors").is_file()
    methods = {m["name"]: m for m in results(tmp_path / "out")["methods"]}
    assert methods["twin"]["tokens_before"] == 0
    assert methods["then-dynamics"]["tokens_before"] == methods["twin"]["tokens"] == 384
    assert methods["then-dynamics"]["tokens"] == methods["dynamics"]["tokens"] == 3 * 64
    assert not list((tmp_path / "out").rglob("checkpoint*"))
    said = io.StringIO()
    compare(inputs, tmp_path / "out", STAGES, dry_run=True, file=said)
    assert "384 + 192 = 576" in said.getvalue()


def test_two_stages_with_an_adapter(inputs: Path, tmp_path: Path) -> None:
    stages = STAGES[: STAGES.index("[methods.dynamics]")].replace(
        'depth = "full"', 'depth = "lora"'
    )
    assert compare(inputs, tmp_path / "out", stages, only=["twin", "then-dynamics"]) == []
    twin, after = (
        load(tmp_path / f"out/runs/{name}/seed-0/model") for name in ("twin", "then-dynamics")
    )
    adapter = {k: v for k, v in twin.state_dict().items() if "lora_" in k}
    assert any(v.any() for k, v in adapter.items() if "lora_B" in k)
    assert all(torch.equal(after.state_dict()[k], v) for k, v in adapter.items())
    assert not torch.equal(frequencies(after, 4), frequencies(twin, 4))
    assert not list((tmp_path / "out/runs/then-dynamics").rglob("model.safetensors"))


def test_dynamics_of_another_kind_are_no_start() -> None:
    text = STAGES + '[methods.ntk]\nmethod = "yarn"\nstart = "dynamics"\ndeviates = "x"\n'
    with pytest.raises(ConfigError, match=r"\[methods.ntk\] start = 'dynamics': depth 'dynamics'"):
        parse(text)
    parse(text.replace('start = "dynamics"\ndeviates = "x"', 'start = "twin"\ndeviates = "x"'))


# Other texts and seeds, and parts that are joined.


def test_changes_to_a_recipe() -> None:
    recipe = parse(RECIPE)
    assert with_changes(recipe) == recipe
    other = with_changes(recipe, data="mine.txt", seeds=(3, 4))
    assert (other.data, other.eval_data, other.seeds) == ("mine.txt", None, (3, 4))
    assert with_changes(recipe, eval_data="held.txt").data == recipe.data
    assert with_changes(recipe, data="books") == replace(
        recipe, data=read_recipe(QUICK).data, eval_data=read_recipe(QUICK).eval_data
    )
    with pytest.raises(ConfigError, match="different numbers"):
        with_changes(recipe, seeds=(1, 1))


def test_parts_are_joined(inputs: Path, finished: Path, tmp_path: Path) -> None:
    """Methods that ran in two folders give the report of those that ran in one."""
    parts = tmp_path / "a", tmp_path / "b"
    for part, only in zip(parts, (("plain-yarn", "base"), ("free", "chunks")), strict=True):
        assert compare(inputs, part, only=only) == []
    with pytest.raises(OutputError, match="no comparison to join"):
        compare(inputs, tmp_path / "all", join=(tmp_path / "nothing",))
    said = io.StringIO()
    assert compare(inputs, tmp_path / "all", join=parts, file=said) == []
    assert "5 of 5 are finished already" in said.getvalue()
    joined = results(tmp_path / "all")
    assert joined["perplexity"] == results(finished)["perplexity"]
    assert [part["command"].split()[6] for part in joined["commands"][:2]] == [
        *("plain-yarn,base", "free,chunks")
    ]


# The numbers.


def test_files(finished: Path) -> None:
    names = {p.name for p in finished.iterdir() if p.is_file()}
    assert names == {
        *("results.json", "results.csv", "report.html", "commands.json", "run.json"),
        *("target.png", "window.png"),
    }
    found = results(finished)
    assert found["failures"] == []
    assert [m["state"] for m in found["methods"]] == ["done"] * 5
    assert found["recipe"] == RECIPE and len(found["commands"]) == 1
    with (finished / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 * 5  # methods, protocols, lengths 16 to 256
    one = next(r for r in rows if (r["method"], r["protocol"], r["length"]) == ("free", *TARGET))
    assert float(one["ppl"]) == cell(found, "free", "target", 256)["ppl"]
    assert json.dumps(found["title"]) in (finished / "report.html").read_text()


TARGET = ("target", "256")


def test_trained_weights_under_other_frequencies(inputs: Path, finished: Path) -> None:
    """`weights` against the same done by hand: the saved weights as a plain model, then YaRN."""
    folder = finished / "runs/plain/seed-0/model"
    model = load_base(folder)
    tokens = load_tokens(inputs / "test.jsonl", load_tokenizer(inputs / "model"))
    plan = PerplexityPlan.for_model(tiny.NATIVE, 4, documents=5)
    config = ClexConfig(method="yarn", max_scale=4)
    by_hand = {
        (row.method, row.protocol, row.length): row
        for row in evaluate_methods(model, tokens, plan, {"plain-yarn": config, "plain": None})
    }
    found = results(finished)
    for key, row in by_hand.items():
        ours = cell(found, *key)
        assert ours["ppl"] == pytest.approx(row.ppl, rel=1e-6), key
        assert (ours["low"], ours["high"]) == pytest.approx((row.ci_low, row.ci_high), rel=1e-6)
    changed = cell(found, "plain-yarn", "target", 256)["ppl"]
    assert changed != pytest.approx(cell(found, "plain", "target", 256)["ppl"], rel=1e-3)
    with as_method(model, config):
        pass  # it was plain


def test_retention_and_differences(finished: Path) -> None:
    found = results(finished)
    retention = {(c["method"], c["length"]): c for c in found["retention"]}
    assert {length for _, length in retention} == {16, 32, 64}
    for length in (16, 32, 64):
        assert retention["free", length]["percent"] == 0  # bit-equal at t = 1
        assert retention["plain", length]["percent"] != 0
        base, plain = (cell(found, name, "window", length)["ppl"] for name in ("base", "plain"))
        assert retention["plain", length]["percent"] == pytest.approx(100 * (plain / base - 1))
    assert found["reference"] == "plain"
    difference = next(
        d
        for d in found["differences"]
        if (d["method"], d["protocol"], d["length"]) == ("chunks", "target", 256)
    )
    ours, plain = (cell(found, name, "target", 256)["ppl"] for name in ("chunks", "plain"))
    assert difference["percent"] == pytest.approx(100 * (ours / plain - 1))
    assert difference["low"] <= difference["percent"] <= difference["high"]


def test_the_best_and_those_level_with_it(finished: Path) -> None:
    found = results(finished)
    for verdict in found["verdicts"]:
        cells = [
            c
            for c in found["perplexity"]
            if (c["protocol"], c["length"]) == (verdict["protocol"], verdict["length"])
        ]
        best = min(cells, key=lambda c: c["ppl"])
        assert verdict["best"] == best["method"] and best["rank"] == "best"
        assert {c["method"] for c in cells if c["rank"] == "tie"} == set(verdict["ties"])
    assert any("One seed" in sentence for sentence in found["sentences"])
    assert any("Only 5 documents" in sentence for sentence in found["sentences"])


def test_frequencies_and_retrieval(finished: Path) -> None:
    found = results(finished)
    curves = {f["method"]: f for f in found["frequencies"]}
    assert set(curves) == {"plain", "plain-yarn", "free", "chunks"}
    last = curves["free"]["scales"][-1]
    assert last["scale"] == 4.0 and last["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)
    assert last["ratio"][0] == pytest.approx(1) and last["ratio"][-1] == pytest.approx(0.25)
    assert np.allclose(curves["plain"]["scales"][-1]["ratio"], 1)
    maps = {(m["method"], m["score"]): m for m in found["maps"]}
    assert len(maps) == 5 * 2 and {m["task"] for m in found["maps"]} == {"passkey"}
    assert maps["free", "choice"]["depths"] == [0.0, 1.0]
    assert maps["free", "choice"]["chance"] == pytest.approx(1 / 3)


def test_seeds_are_averaged(inputs: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("max_scale = 4", "max_scale = 4\nseeds = [3, 5]")
    text = text.replace("steps = 3", "steps = 1").replace("[evaluation.passkey]", "[ignored]")
    text = text[: text.index("[ignored]")] + text[text.index("[methods.plain]") :]
    text = text[: text.index("[methods.chunks]")]
    out = tmp_path / "out"
    assert compare(inputs, out, text) == []
    found = results(out)
    by_seed = {
        (row["method"], row["seed"]): row
        for row in found["rows"]
        if (row["protocol"], row["length"]) == ("target", 256)
    }
    # What learns nothing is measured once; what is trained, or reads trained weights, twice.
    assert set(by_seed) == {
        *(("base", 3), ("free", 3), ("plain", 3), ("plain", 5)),
        *(("plain-yarn", 3), ("plain-yarn", 5)),
    }
    for name in ("plain", "plain-yarn"):
        a, b = by_seed[name, 3], by_seed[name, 5]
        ours = cell(found, name, "target", 256)
        assert a["nll"] != b["nll"]
        assert ours["ppl"] == pytest.approx(math.exp((a["nll"] + b["nll"]) / 2))
        assert sorted(ours["seeds"]) == pytest.approx(sorted([a["ppl"], b["ppl"]]))
        assert (ours["min"], ours["max"]) == (min(ours["seeds"]), max(ours["seeds"]))


def test_level_is_honest() -> None:
    assert not level((0.1, 0.2), [2.0], [1.0])
    assert level((-0.1, 0.2), [2.0], [1.0])
    assert level(None, [2.0], [1.0])  # one document proves nothing
    assert level((0.1, 0.2), [1.2, 2.0], [1.0, 1.3])
    assert not level((0.1, 0.2), [1.4, 2.0], [1.0, 1.3])
    seeds = [Losses((10.0, 30.0), (10, 20)), Losses((20.0, 30.0), (10, 20))]
    mean = Losses.mean(seeds)
    assert mean.sums == (15.0, 30.0) and mean.nll == 1.5
    assert mean.difference(mean) == (0.0, 0.0)
    assert Losses((1.0,), (1,)).interval() is None


# Failures and going on.


def test_a_failure_leaves_the_others_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", runner.run_extend
    short = RECIPE.replace("steps = 3", "steps = 1")
    (inputs / "recipe.toml").write_text(short)

    def fails(*arguments: Any, **options: Any) -> Any:
        if options["clex"].method == "none":
            raise TrainingError("the loss is not a number at step 1")
        if options["clex"].method == "yarn":
            raise ZeroDivisionError("of its own")
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_extend", fails)
        arguments = ["clex", "compare", inputs / "recipe.toml", "--out", out, "--device", "cpu"]
        patch.setattr(sys, "argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 1
    found = results(out)
    errors = {(f["method"], f["what"]): f["error"] for f in found["failures"]}
    assert errors == {
        ("plain", "training"): "the loss is not a number at step 1",
        ("plain-yarn", "frequencies"): "needs 'plain', seed 0, which is not trained",
        ("plain-yarn", "perplexity"): "needs 'plain', seed 0, which is not trained",
        ("plain-yarn", "passkey"): "needs 'plain', seed 0, which is not trained",
        ("chunks", "training"): "ZeroDivisionError: of its own",
    }
    states = {m["name"]: m["state"] for m in found["methods"]}
    assert states["base"] == states["free"] == "done" and states["chunks"] == "failed"
    assert {c["method"] for c in found["perplexity"]} == {"base", "free"}
    log = (out / "runs/chunks/seed-0/error.log").read_text()
    assert "Traceback" in log and "of its own" in log

    before = (out / "runs/free/seed-0/perplexity.json").read_bytes()
    assert compare(inputs, out, short) == []
    assert results(out)["failures"] == []
    assert (out / "runs/free/seed-0/perplexity.json").read_bytes() == before
    assert not (out / "runs/chunks/seed-0/error.log").exists()


def test_a_folder_that_cannot_be_written_is_a_failure_of_its_method_alone(
    inputs: Path, tmp_path: Path
) -> None:
    budget = RECIPE.split("[methods")[0]
    free = "train = false\nmethod = 'yarn'\n"
    text = f"{budget}[methods.one]\n{free}[methods.two]\n{free}"
    out = tmp_path / "out"
    assert compare(inputs, out, text) == []
    shutil.rmtree(out / "runs/one")
    (out / "runs/one").write_text("")  # in the way of the folder, also for the root user
    (out / "runs/two/seed-0/perplexity.json").unlink()

    (line,) = compare(inputs, out, text)
    assert line.startswith("one, seed 0, folder: cannot write") and "runs/one" in line
    found = results(out)
    (failure,) = found["failures"]
    assert (failure["method"], failure["what"], failure["log"]) == ("one", "folder", None)
    assert line.endswith(failure["error"])
    assert {m["name"]: m["state"] for m in found["methods"]}["one"] == "failed"
    assert {c["method"] for c in found["perplexity"]} == {"base", "two"}

    (out / "runs/one").unlink()
    assert compare(inputs, out, text) == []
    assert results(out)["failures"] == []


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
import datasets
import clex.training
from clex.comparison.runner import run_compare
recipe, out, cache = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = Path(cache)
whole = clex.training.ExtensionTrainer._save_checkpoint
def dies(self, *arguments):
    whole(self, *arguments)
    if "chunks" in str(self.folder):
        os.kill(os.getpid(), signal.SIGKILL)
clex.training.ExtensionTrainer._save_checkpoint = dies
run_compare(recipe, out, device="cpu")
"""


def test_after_a_kill_it_goes_on(inputs: Path, finished: Path, tmp_path: Path) -> None:
    """Killed right after the first checkpoint of the last method; then as if nothing had been."""
    out = tmp_path / "out"
    (inputs / "recipe.toml").write_text(RECIPE)
    command = [sys.executable, "-c", KILLED, str(inputs / "recipe.toml"), str(out)]
    child = subprocess.run(
        [*command, str(inputs / "cache")], capture_output=True, text=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (out / "results.json").exists()
    kept = [p for p in out.glob("runs/*/seed-0/*.json") if "chunks" not in str(p)]
    assert len(kept) == 4 * 3 + 1
    before = {p: p.read_bytes() for p in kept}
    said = io.StringIO()
    assert compare(inputs, out, file=said) == []
    assert "4 of 5 are finished already" in said.getvalue()
    assert {p: p.read_bytes() for p in kept} == before
    log = (out / "runs/chunks/seed-0/model/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3]
    ours, theirs = results(out), results(finished)
    assert len(ours["commands"]) == 2
    for one, other in zip(ours["perplexity"], theirs["perplexity"], strict=True):
        assert one["ppl"] == pytest.approx(other["ppl"], rel=1e-5)


def test_what_changed_is_done_anew(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = RECIPE.replace("steps = 3", "steps = 1")
    assert compare(inputs, out, short, only=("plain-yarn",)) == []
    found = results(out)
    # What it builds on was run as well, and nothing else.
    assert {c["method"] for c in found["perplexity"]} == {"plain", "plain-yarn"}
    trained = out / "runs/plain/seed-0/trained.json"
    measured = out / "runs/plain/seed-0/perplexity.json"
    asked = (out / "runs/plain/seed-0/passkey.json").read_bytes()
    before, first = trained.read_bytes(), measured.read_bytes()

    assert (
        compare(inputs, out, short.replace("documents = 5", "documents = 4"), only=("plain",)) == []
    )
    assert trained.read_bytes() == before and measured.read_bytes() != first
    assert (out / "runs/plain/seed-0/passkey.json").read_bytes() == asked
    assert cell(results(out), "plain", "target", 256)["documents"] == 4

    longer = short.replace("steps = 1", "steps = 2")
    with pytest.raises(OutputError, match="was trained with other settings; pass --overwrite"):
        compare(inputs, out, longer, only=("plain",))
    assert trained.read_bytes() == before
    assert compare(inputs, out, longer, only=("plain",), overwrite=True) == []
    assert trained.read_bytes() != before


def test_a_dry_run_writes_nothing(inputs: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    assert compare(inputs, tmp_path / "out", dry_run=True, file=said) == []
    assert not (tmp_path / "out").exists()
    table = said.getvalue()
    assert "384" in table and "weights of plain, yarn at test" in table
    shares = [int(word[:-1]) for word in table.split() if word.endswith("%")]
    assert len(shares) == 5 and 97 <= sum(shares) <= 103
    with pytest.raises(ConfigError, match="unknown method 'chunk'; did you mean 'chunks'"):
        compare(inputs, tmp_path / "out", only=("chunk",))


def test_folders_of_others_are_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="was not written by clex compare"):
        compare(inputs, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_budget_is_told(finished: Path) -> None:
    """The settings that the report calls equal are those that every training was given."""
    budget = results(finished)["budget"]
    recipe = parse(RECIPE)
    for name in ("plain", "chunks"):
        given = asdict(recipe.training(recipe.method(name), 0))
        assert {key: given[key] for key in budget["settings"]} == budget["settings"]
    assert budget["tokens"] == 384
