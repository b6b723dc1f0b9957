"""`benchmarks.differences`: perplexities and differences of stored sums, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks import differences

SUMS = {("a", "0"): [30.0, 50.0], ("a", "1"): [34.0, 46.0], ("b", "0"): [36.0, 52.0]}
TOKENS = [10, 20]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    head = "set,method,seed,protocol,length,document,nll,tokens,hits\n"
    for name in "ab":
        lines = [
            f"test,{method},{seed},target,512,{number},{nll},{TOKENS[number]},1\n"
            for (method, seed), sums in SUMS.items()
            if method == name
            for number, nll in enumerate(sums)
        ]
        (tmp_path / f"{name}.csv").write_text(head + "".join(reversed(lines)))
    return [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]


@pytest.mark.parametrize(("seed", "of_a"), [(None, [32.0, 48.0]), ("0", [30.0, 50.0])])
def test_against_numpy(
    files: list[str], capsys: pytest.CaptureFixture[str], seed: str | None, of_a: list[float]
) -> None:
    words = [*files, "--of", "test/a", "--to", "test/b"]
    differences.main([*words, "--seed", seed] if seed else words)
    total = sum(TOKENS)
    ours, theirs = np.exp(sum(of_a) / total), np.exp(sum(SUMS["b", "0"]) / total)
    name, length, one, other, percent = capsys.readouterr().out.split()[:5]
    assert (name, length) == ("target", "512")
    assert float(one) == pytest.approx(ours, abs=1e-3)
    assert float(other) == pytest.approx(theirs, abs=1e-3)
    assert float(percent) == pytest.approx(100 * (ours / theirs - 1), abs=1e-2)


def test_unknown_methods_are_told(files: list[str]) -> None:
    with pytest.raises(SystemExit, match="no rows of test/c"):
        differences.main([*files, "--of", "test/c", "--to", "test/b"])
