"""The benchmarks of open-ended texts, decoding and fits run, and say what they should."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_crossings(benchmark: Any, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    data = tiny.write_documents(tmp_path / "data.jsonl", [300, 100, 280])
    arguments = [str(model), "--data", str(data), "--lengths", "64,128,256", "--tokens", "16"]
    with tiny.token_cache(tmp_path / "cache"):
        rows = benchmark("crossings").main([*arguments, "--out", str(tmp_path / "out")])
    assert {row.document for row in rows} == {0, 2}  # the ones that are long enough
    assert len(rows) == 2 * 2 * 2 * 3  # documents, crossings, paths, policies
    for path in ("jump", "grid"):
        kl = {
            policy: max(r.kl for r in rows if (r.path, r.policy) == (path, policy))
            for policy in ("refill", "rerotate", "hold")
        }
        assert kl["refill"] < 1e-5 < kl["rerotate"] < kl["hold"]
    for row in rows:
        assert row.seconds > 0 or row.policy == "hold"
        assert (row.t_from, row.t_to) == (
            row.length / 64,
            (row.length if row.policy == "hold" else row.until) / 64,
        )
        if row.policy == "refill":
            assert math.isclose(row.nll, row.nll_full, rel_tol=1e-4) and row.agreement == 1
    (report,) = (tmp_path / "out").glob("*-cpu-model-crossings.json")
    assert len(json.loads(report.read_text())["rows"]) == len(rows)
    table = report.with_suffix(".md").read_text()
    assert table.count("| rerotate |") == 4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding(benchmark: Any, tmp_path: Path, cache: str) -> None:
    model = tiny.write_model(tmp_path / "model")
    arguments = [str(model), "--contexts", "32,96", "--tokens", "4", "--repeats", "2"]
    rows = benchmark("decoding").main([*arguments, "--cache", cache, "--out", str(tmp_path)])
    assert [(row.context, row.model) for row in rows] == [
        (32, "plain"),
        (32, "extended"),
        (96, "plain"),
        (96, "extended"),
    ]
    assert all(speed > 0 for row in rows for speed in row.tokens_per_second)
    assert list(tmp_path.glob(f"*-cpu-model-decoding-{cache}.md"))


def test_fit_cost(benchmark: Any, tmp_path: Path) -> None:
    arguments = ["SmolLM2-135M", "--small", "--device", "cpu", "--scales", "2", "--repeats", "5"]
    reading, window = benchmark("fit_cost").main([*arguments, "--out", str(tmp_path)]).rows
    assert reading.case == window.case == "tiny, 128"
    assert reading.repeats == window.repeats == 5 and reading.share == 1
    # A step reads the window and goes back through it, with the optimizer and the log beside.
    assert window.median_ms > reading.median_ms > 0
    assert list(tmp_path.glob("*-cpu-tiny-fit_cost.md"))


def test_whole_fit(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the time goes with the square of the length, the mean is that of t squared."""
    rows = [
        {"case": f"tiny, {64 * t:,}", "way": way, "median_ms": second * 1e3 * t**2}
        for t in (1, 2, 8)
        for way, second in (("reading", 0.5), ("window", 2.0))
    ]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"settings": {"model": "tiny"}, "rows": rows}))
    benchmark("whole_fit").main([str(file)])
    mean = (8**3 - 1) / 3 / 7
    chosen = 7 * sum(0.5 * (1 + 7 * k / 6) ** 2 for k in range(1, 7))
    assert capsys.readouterr().out == (
        f"512 tokens: 48 windows {96 * mean:.0f} s, 160 windows {320 * mean:.0f} s,"
        f" choosing {chosen:.0f} s\n"
    )
