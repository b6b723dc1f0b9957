"""The factor search: constraint, budget, coming back, and what it is worth."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import clex
import clex.search
import tiny
from clex import cli
from clex.errors import CheckpointError, ConfigError, DataError, OutputError
from clex.evaluation.perplexity import PerplexityPlan, evaluate_methods
from clex.rope import RopeSpec
from clex.search import (
    HEADROOM,
    RESULT_FILE,
    STARTS,
    STATE_FILE,
    SearchConfig,
    SearchResult,
    Trial,
    candidate,
    run_search,
    search_longrope,
    start_factors,
)
from references import Shape, make_spec

TOKENS = tiny.make_tokens([300, 280, 530])
SMALL = SearchConfig(scale=4, evaluations=11, population=4, windows=2)


def search(folder: Path | None = None, model: Any = None, **settings: Any) -> SearchResult:
    config = SearchConfig(**{**vars(SMALL), **settings})
    model = model or tiny.make_model()
    return search_longrope(model, TOKENS, config, folder, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search()


def test_never_worse_than_the_best_start(result: SearchResult) -> None:
    assert [trial.origin for trial in result.trials[:3]] == list(STARTS)
    assert result.best.nll == min(trial.nll for trial in result.trials)
    assert result.best.nll <= min(trial.nll for trial in result.trials[:3])
    assert len(result.trials) == 11, "the budget is the number of evaluations"


def test_the_constraint_holds(result: SearchResult) -> None:
    for trial in result.trials:
        assert list(trial.factors) == sorted(trial.factors), trial
        assert trial.factors[0] >= 1 and trial.factors[-1] <= HEADROOM * 4, trial
    assert len({trial.factors for trial in result.trials}) == 11, "no list is measured twice"


def test_losses_are_those_of_the_method(result: SearchResult) -> None:
    """What is reported is what the ordinary evaluation says of the returned config."""
    plan = PerplexityPlan((256,), 1, windows=1, documents=2)
    tokens = TOKENS.select([0, 1])
    model = tiny.make_model()
    rows = evaluate_methods(model, tokens, plan, {"found": result.config()})
    assert rows[0].nll == pytest.approx(result.best.nll, rel=1e-12)


def test_starts_are_the_methods() -> None:
    spec = make_spec(Shape(head_dim=64, theta=1e4, native_length=2048))
    starts = start_factors(spec, 4.0)
    assert starts["linear"] == (4.0,) * 32
    assert starts["ntk"] == pytest.approx([4 ** (i / 31) for i in range(32)], rel=1e-5)
    assert starts["yarn"][0] == 1 and starts["yarn"][-1] == pytest.approx(4)


def test_dimensions_that_do_not_rotate() -> None:
    spec = make_spec(Shape(head_dim=64, theta=1e4, native_length=2048))
    still = spec.inv_freq.clone()
    still[20:] = 0
    starts = start_factors(RopeSpec(still, 2048, 1e4), 4.0)
    for factors in starts.values():
        assert list(factors) == sorted(factors) and all(map(math.isfinite, factors))


def test_candidates_follow_from_seed_and_number() -> None:
    starts = {
        "linear": (4.0,) * 8,
        "ntk": tuple(4 ** (i / 7) for i in range(8)),
        "yarn": (1.0,) * 8,
    }
    trials: list[Trial] = []
    for index in range(200):
        factors, origin = candidate(index, trials, starts, SMALL)
        assert candidate(index, trials, starts, SMALL) == (factors, origin)
        assert list(factors) == sorted(factors)
        assert factors[0] >= 1 and factors[-1] <= 5
        trials.append(Trial(factors, float(index % 17), origin))
    other = SearchConfig(**{**vars(SMALL), "seed": 1})
    assert candidate(50, trials[:50], starts, other) != candidate(50, trials[:50], starts, SMALL)
    assert len({trial.factors for trial in trials}) == 200


def test_same_seed_same_result(result: SearchResult) -> None:
    assert search() == result
    assert search(seed=1).trials != result.trials


@pytest.mark.parametrize("after", [1, 4, 6])
def test_interrupted_equals_uninterrupted(
    tmp_path: Path, result: SearchResult, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    measure, calls = clex.search.measure, 0

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(clex.search, "measure", killed)
    model = tiny.make_model()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, model)
    assert clex.hf.extend.extension_of(model) is None, "the model is plain again"
    assert not (tmp_path / RESULT_FILE).exists()
    calls = -1000
    assert search(tmp_path) == result
    assert calls == -1000 + 11 - after, "nothing is measured twice"
    assert search(tmp_path) == result and calls == -1000 + 11 - after


def test_a_larger_budget_goes_on(tmp_path: Path, result: SearchResult) -> None:
    search(tmp_path, evaluations=6)
    assert search(tmp_path) == result
    assert search(tmp_path, evaluations=6).trials == result.trials[:6]


def test_result_file_extends_a_model(tmp_path: Path, result: SearchResult) -> None:
    assert search(tmp_path) == result
    written = json.loads((tmp_path / RESULT_FILE).read_text())
    config = clex.ClexConfig.from_dict(written["clex"])
    assert config.method == "longrope" and config.max_scale == 4
    assert config.options == {"long_factor": list(result.best.factors)}
    model = clex.extend(tiny.make_model(), config)
    native = make_native(model)
    expected = native / torch.tensor(result.best.factors)
    torch.testing.assert_close(clex.frequencies(model, 4.0), expected)


def make_native(model: Any) -> Any:
    return clex.frequencies(model, 1.0)


def test_it_finds_a_known_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up loss with its minimum away from all starts: most of the way is found."""
    spec = make_spec(Shape(head_dim=32, theta=1e4, native_length=64))
    wanted = torch.linspace(0, 1, 16) ** 2 * math.log(3)
    starts = start_factors(spec, 4.0)

    def loss(factors: tuple[float, ...]) -> float:
        return float((torch.tensor(factors).log() - wanted).square().mean())

    config = SearchConfig(scale=4, evaluations=200)
    trials: list[Trial] = []
    for index in range(200):
        factors, origin = candidate(index, trials, starts, config)
        trials.append(Trial(factors, loss(factors), origin))
    first, last = min(t.nll for t in trials[:3]), min(t.nll for t in trials)
    assert last < 0.25 * first, (first, last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"evaluations": 2}, "evaluations"),
        ({"population": 3}, "population"),
        ({"windows": 0}, "windows"),
        ({"temperature": "learned"}, "unknown temperature"),
        ({"temperature": "yarm"}, "did you mean 'yarn'"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**settings)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="plain model"):
        search(model=clex.extend(tiny.make_model()))
    with pytest.raises(DataError, match="640 tokens"):
        search(scale=10)


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    search(tmp_path, evaluations=3)
    with pytest.raises(OutputError, match=r"other settings \(seed\)"):
        search(tmp_path, seed=1)
    with pytest.raises(OutputError, match="weights"):
        search(tmp_path, tiny.make_model(seed=3))
    state = json.loads((tmp_path / STATE_FILE).read_text())
    state["trials"][1]["factors"][0] = 2.0
    (tmp_path / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="damaged"):
        search(tmp_path)
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=STATE_FILE):
        search(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("inputs")
    with tiny.token_cache(folder / "cache"):
        yield (
            tiny.write_model(folder / "model"),
            tiny.write_documents(folder / "data.jsonl", [270, 300]),
        )


def test_command(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(out: Path, *more: str) -> int:
        model, data = map(str, files)
        command = ["clex", "search-longrope", model, "--data", data, "--out", str(out)]
        command += ["--evaluations", "5", "--windows", "1", "--device", "cpu", *more]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert call(tmp_path / "out") == 0
    before = (tmp_path / "out" / RESULT_FILE).read_text()
    assert json.loads(before)["search"]["evaluations"] == 5
    assert set(json.loads(before)["starts"]) == set(STARTS)
    assert call(tmp_path / "out") == 0
    assert (tmp_path / "out" / RESULT_FILE).read_text() == before
    assert call(tmp_path / "out", "--scale", "3") == 2
    assert "other settings" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert call(tmp_path / "full") == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_an_output_that_is_a_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        run_search(str(files[0]), files[1], tmp_path / "out", search=SMALL)
