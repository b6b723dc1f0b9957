"""`benchmarks.parts` runs what can be run, once, in time; the list of evidence is in order."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import parts

from clex.comparison.recipe import read_recipe
from clex.errors import ConfigError

ROOT = Path(__file__).parents[1]
LIST = """
[jobs.last]
command = "cat {OUT}/first {TEXT} > {OUT}/last"
needs = ["first"]
[jobs.first]
command = "echo again >> {OUT}/first"
[jobs.broken]
command = "exit 3"
[jobs.after-broken]
command = "touch {OUT}/never"
needs = ["broken"]
[jobs.after-both]
command = "touch {OUT}/never"
needs = ["after-broken", "last"]
[jobs.long]
command = "touch {OUT}/never"
minutes = 5
"""


def run(tmp_path: Path, *more: object, text: str = LIST) -> int:
    (tmp_path / "list.toml").write_text(text)
    out = ["--out", tmp_path / "out", "--set", f"TEXT={tmp_path / 'a text'}", "--minutes", 1]
    return parts.main([str(a) for a in (tmp_path / "list.toml", *out, *more)])


def test_order_failure_time_and_a_second_call(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a text").write_text("given\n")
    out, begun = tmp_path / "out", time.monotonic()
    assert run(tmp_path, "--at-once", 3) == 1
    assert time.monotonic() - begun < 30  # what cannot be begun any more is not waited for
    said = capsys.readouterr().out
    assert "2 of 6 done" in said and "broken (failed)" in said
    assert (out / "last").read_text() == "again\ngiven\n" and not (out / "never").exists()
    # What is done stays, what failed is tried again.
    assert run(tmp_path, text=LIST.replace("exit 3", "true")) == 1
    assert (out / "first").read_text() == "again\n" and (out / "never").exists()
    assert capsys.readouterr().out.rstrip().endswith("long")


def test_the_end_of_the_time(tmp_path: Path) -> None:
    """A command that is still running then is stopped, with all that it has started."""
    text = '[jobs.slow]\ncommand = "sleep 60; touch {OUT}/never"\n'
    assert run(tmp_path, "--minutes", 0.01, text=text) == 1
    assert not (tmp_path / "out" / "never").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[jobs.a]\ncommand = 'echo {NAME}'", "'NAME'; give --set"),
        ("[jobs.a]\ncommand = 'true'\nneeds = ['b']", "needs 'b', which is no job"),
        ("[jobs.a]\ncommand = 'true'\nneed = ['b']", "has no 'need'"),
        ("[jobs.a]\nminutes = 1", "has no command"),
        ("[job", "cannot read jobs"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        parts.read_jobs(tmp_path / "list.toml", {"OUT": "out"})


def test_the_list_of_evidence() -> None:
    """Its rows are those of the recipes, and no job builds on one that it does not wait for."""
    names = ("OUT", "TRAIN", "TEST", "NOVELS", "PROOFS", "UNSEEN")
    jobs = parts.read_jobs(ROOT / "benchmarks" / "evidence.toml", {name: name for name in names})
    assert len(jobs) > 10 and len({job.name for job in jobs}) == len(jobs)
    compared = 0
    for job in jobs:
        words = shlex.split(job.command)
        assert 1 < job.minutes < 12
        others = {word.split("/")[1] for word in words if word.startswith("OUT/")} - {job.name}
        made = {name for name in others if name in {other.name for other in jobs}}
        assert made <= set(job.needs), job.name
        commands = [other.command for other in jobs if other.name in job.needs]
        for word in words:  # models in a folder of several jobs
            if "/runs/" in word:
                assert any(word.split("/")[3] in command for command in commands), job.name
        if "compare" not in words:
            continue
        path, only = words[words.index("compare") + 1], words[words.index("--only") + 1]
        recipe = read_recipe(ROOT / path)
        methods = [recipe.method(name) for name in only.split(",")]
        compared += len(methods)
        # Else each would search for the key tokens anew.
        measured = [m for m in methods if m.measured and m.name != "untrained"]
        assert ("--join" in words) == bool(measured and recipe.evaluation.evaluator == "native")
    assert compared > 10
