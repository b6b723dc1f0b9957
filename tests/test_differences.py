"""`benchmarks.differences` and `pictures`: what they say of stored sums, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import differences, pictures
from matplotlib.axes import Axes

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


def test_picture(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = [], Axes.errorbar

    def errorbar(
        axis: Axes, lengths: list[int], middle: list[float], bars: Any, **more: Any
    ) -> Any:
        drawn.append((axis.get_title(), lengths, middle, bars, more["label"]))
        return real(axis, lengths, middle, bars, **more)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    two = tmp_path / "c.csv"
    two.write_text(
        "set,method,seed,protocol,length,document,nll,tokens,hits\n"
        "test,c,0,target,512,0,60,30,1\ntest,c,1,target,512,0,90,30,1\n"
    )
    out = ["--out", str(tmp_path / "a.png")]
    pictures.main([*files, str(two), "--of", "test/b=theirs", "test/c", *out])
    last = [line for line in drawn if line[0] == pictures.SIDES["target"]]
    assert [(line[1], line[4]) for line in last] == [([512], "theirs"), ([512], "test/c")]
    assert last[0][2] == pytest.approx([np.exp(88 / 30)]) and last[0][3] == [[0.0], [0.0]]
    middle = np.exp(2.5)
    assert last[1][2] == pytest.approx([middle])
    assert np.ravel(last[1][3]) == pytest.approx([middle - np.exp(2), np.exp(3) - middle])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="no rows of test/d"):
        pictures.main([*files, "--of", "test/d", *out])
