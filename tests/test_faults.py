"""Kills, full disks, damaged files, two writers: an error of one line, and nothing is lost."""

from __future__ import annotations

import ctypes
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import kills
from rich.console import Console

import clex
import tiny
from clex import training
from clex.data import load_tokens
from clex.digests import digests_of, require_digests
from clex.errors import CheckpointError, ClexError, ConfigError, OutputError
from clex.evaluation.retrieval import Trial
from clex.evaluation.trials import TrialLog
from clex.files import TEMPORARY, new_files, new_folder, only_writer, read_json, write_json
from clex.hf.checkpoint import CONFIG_FILE, WEIGHTS_FILE, is_checkpoint
from clex.hf.models import load_base
from clex.run_folder import claimed
from clex.training import TrainConfig

TOKENS = tiny.make_tokens([300, 280])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return clex.extend(tiny.make_model(**changes), clex.ClexConfig(max_scale=4, steps=4))


def train(folder: Path, **settings: Any) -> Any:
    config = TrainConfig(**{"steps": 4, "save_every": 2, **settings})
    return training.train(make(), TOKENS, config, folder, console=Console(file=io.StringIO()))


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def one_line(error: BaseException) -> str:
    assert isinstance(error, ClexError)
    assert "\n" not in str(error)
    return str(error)


# Kills.


@pytest.mark.parametrize("name", ["training, dynamics", "exporting, hf"])
def test_kills_at_random_moments(name: str, tmp_path: Path) -> None:
    """Two each; fifty by hand: `python -m benchmarks.kills`."""
    kills.write_inputs(tmp_path / "inputs")
    record = kills.kill_job(name, 2, tmp_path, tmp_path / "inputs", random.Random(0))
    assert record["failures"] == []
    assert record["survived"] == record["kills"] == 2


def test_the_kills_see_what_only_looks_finished(tmp_path: Path) -> None:
    train(tmp_path)
    found = kills._extend_finished(tmp_path)
    assert kills.wrong_parts(found, found) == []
    assert kills.wrong_parts(found, {"weights": {WEIGHTS_FILE: "0"}}) == ["weights"]
    flip(tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="is damaged"):
        kills._extend_finished(tmp_path)


# Full disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many kilobytes, where this user may."""
    libc = ctypes.CDLL(None, use_errno=True)
    places: list[Path] = []

    def make_disk(kilobytes: int) -> Path:
        place = tmp_path / f"disk-{len(places)}"
        place.mkdir()
        options = f"size={kilobytes}k".encode()
        if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, options) != 0:
            pytest.skip("only root may mount a small file system")
        places.append(place)
        return place

    yield make_disk
    for place in places:
        libc.umount2(str(place).encode(), 2)  # detach, whoever is still in it


def test_disk_full_in_training(small_disk: Callable[[int], Path]) -> None:
    """The first checkpoint fits, the second does not; with more room the run goes on."""
    sizes = []
    for steps in (2, 4):
        place = small_disk(64_000)
        train(place / "out", depth="full", steps=steps)
        sizes.append(sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) // 1024)
    place = small_disk((sizes[0] + sizes[1]) // 2)
    with pytest.raises(OutputError, match=r"no space left|is the disk full") as caught:
        train(place / "out", depth="full")
    one_line(caught.value)
    assert not is_checkpoint(place / "out")
    good = training._last_complete(place / "out" / "checkpoints")
    assert good is not None
    assert good.endswith("checkpoint-2")
    room = small_disk(64_000)
    shutil.copytree(place / "out", room / "out")
    assert not (room / "out" / "checkpoints" / "checkpoint-4").exists()  # removed: not whole
    went_on, whole = train(room / "out", depth="full"), train(room / "whole", depth="full")
    assert torch.equal(went_on.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("weights", ["none", "full"])
def test_disk_full_in_save(small_disk: Callable[[int], Path], weights: Any) -> None:
    place = small_disk(4 if weights == "none" else 128)
    with pytest.raises(OutputError) as caught:
        clex.save(make(), place / "out", weights=weights)
    one_line(caught.value)
    assert not list((place / "out").iterdir())


def test_disk_full_in_the_table_of_tokens(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    file = tiny.write_documents(tmp_path / "a.jsonl", [20_000] * 20)
    with tiny.token_cache(small_disk(300)):
        with pytest.raises(OutputError, match="no space left to write") as caught:
            load_tokens(file, tiny.make_tokenizer())
        one_line(caught.value)
    with tiny.token_cache(tmp_path / "cache"):
        assert len(load_tokens(file, tiny.make_tokenizer())) == 20


def test_disk_full_in_a_folder_that_is_replaced(small_disk: Callable[[int], Path]) -> None:
    place = small_disk(64)
    with new_folder(place / "out") as folder:
        (folder / "old").write_text("kept")
    with pytest.raises(OutputError, match="no space left"), new_folder(place / "out") as folder:
        (folder / "new").write_bytes(bytes(100_000))
    assert [p.name for p in place.rglob("*")] == ["out", "old"]


# Places that cannot be written.


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write") as caught:
        clex.save(make(), tmp_path / "out", weights="none")
    one_line(caught.value)


def test_read_only_file_system(small_disk: Callable[[int], Path]) -> None:
    place = small_disk(1000)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(None, str(place).encode(), None, 32 | 1, None) == 0  # remount, read-only
    for write in (
        lambda: clex.save(make(), place / "out", weights="none"),
        lambda: train(place / "out"),
        lambda: write_json(place / "file.json", {}),
    ):
        with pytest.raises(OutputError, match="cannot write") as caught:
            write()
        one_line(caught.value)


# Damaged files.


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["optimizer.pt", WEIGHTS_FILE, "trainer_state.json"])
def test_damaged_checkpoint_of_training(
    tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    last = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    damage(last / name)
    with pytest.raises(CheckpointError, match="cannot go on from") as caught:
        train(tmp_path / "cut")
    assert "delete that folder to go on from the one before it" in one_line(caught.value)
    assert (last / "complete.json").is_file()  # nothing is deleted that the user might want
    shutil.rmtree(last)
    train(tmp_path / "cut")
    files = (tmp_path / folder / WEIGHTS_FILE for folder in ("whole", "cut"))
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_shard(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """Of a result, whose SHA-256 are known; a flipped byte in any of its files is found."""
    model = make()
    save_pretrained = type(model).save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        sharded = {"max_shard_size": "100KB"}
        patch.setattr(
            type(model), "save_pretrained", lambda *a, **k: save_pretrained(*a, **k, **sharded)
        )
        clex.save(model, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert set(read_json(tmp_path / CONFIG_FILE)["sha256"]) == {
        WEIGHTS_FILE,
        "model.safetensors.index.json",
        *(shard.name for shard in shards),
    }
    clex.load(tmp_path)
    damage(shards[1])
    with pytest.raises(CheckpointError, match=shards[1].name) as caught:
        clex.load(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_plain_model(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """Nothing is recorded of a model from elsewhere; what cannot be whole is refused."""
    folder = tiny.write_model(tmp_path / "model")
    damage(folder / "model.safetensors")
    with pytest.raises(ConfigError, match="cannot load model") as caught:
        load_base(folder)
    one_line(caught.value)


def test_plain_model_without_some_weights(tmp_path: Path) -> None:
    """transformers would warn and put random numbers there."""
    from safetensors.torch import load_file, save_file

    folder = tiny.write_model(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 tensors are missing, such as model"):
        load_base(folder)


def test_a_sharded_result_over_a_single_file(tmp_path: Path) -> None:
    """A file of the earlier result would be read in place of the new ones."""
    clex.save(make(), tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of an even earlier one")
    clex.save(make(), tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    recorded = digests_of(tmp_path, ["a", "b"])
    require_digests(tmp_path, recorded)
    flip(tmp_path / "b", 0)
    require_digests(tmp_path, recorded, ["a"])
    with pytest.raises(CheckpointError, match="b is damaged"):
        require_digests(tmp_path, recorded)
    # The record is a file as well, and may say anything.
    for bad in (
        [],
        "x",
        {"../a": "0"},
        {"a": 1},
        {"/etc/passwd": "0"},
        {"b/../../a": "0"},
        {"": "0"},
    ):
        with pytest.raises(CheckpointError, match="SHA-256 of the files"):
            require_digests(tmp_path, bad)


def test_digests_of_files_in_folders(tmp_path: Path) -> None:
    """Engines that cut weights up write folders of them into a checkpoint."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "part-0").write_bytes(b"one")
    recorded = digests_of(tmp_path, ["weights/part-0"])
    require_digests(tmp_path, recorded)
    flip(tmp_path / "weights" / "part-0", 0)
    with pytest.raises(CheckpointError, match="part-0 is damaged"):
        require_digests(tmp_path, recorded)


def test_a_trial_that_was_cut_off(tmp_path: Path) -> None:
    trial = Trial(
        **dict(method="clex", length=64, depth=0.5, actual_depth=0.5, needle=0, scale=1.0),
        **dict(statement="é", answer="é", generated=None, exact=None, choice=True, gain=True),
        **dict(log_probs=(0.0,), absent_log_probs=(0.0,), answer_tokens=1),
    )
    file = tmp_path / "trials.jsonl"
    TrialLog(file).keep(trial)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:-9])
    assert TrialLog(file).done == [trial]
    assert file.read_bytes() == whole
    file.write_bytes(b"\xff\n" + whole)
    with pytest.raises(CheckpointError, match="is damaged"):
        TrialLog(file)


# Two writers.


def test_two_writers_of_a_folder(tmp_path: Path) -> None:
    def claim() -> None:
        with claimed(tmp_path / "run", {}, False):
            pass

    with claimed(tmp_path / "run", {}, False):
        with pytest.raises(OutputError, match="another process is writing to") as caught:
            claim()
        one_line(caught.value)
    claim()  # free again
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        with pytest.raises(OutputError, match="another process"), new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_lock_of_a_writer_that_has_just_finished(tmp_path: Path) -> None:
    """Its lock file is gone: who opened it before must not hold a lock that nobody else sees."""
    lock, replaced = tmp_path / "lock", []
    stat = Path.stat

    def meanwhile(path: Path, **how: Any) -> os.stat_result:
        if path == lock and not replaced:
            replaced.append(lock)
            lock.unlink()
            lock.touch()
        return stat(path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "stat", meanwhile)
        with only_writer(tmp_path, lock):
            assert replaced
            with pytest.raises(OutputError), only_writer(tmp_path, lock):
                pass


def test_what_a_kill_left_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep" / f"{TEMPORARY}half").mkdir(parents=True)
    (tmp_path / "out" / f"{TEMPORARY}results.json.x.json").write_text("{")
    (tmp_path / f"{TEMPORARY}other").mkdir()
    (tmp_path / f"{TEMPORARY}other" / "half").touch()
    with claimed(tmp_path / "out", {}, False), new_folder(tmp_path / "other"):
        pass
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    assert (tmp_path / "out" / "deep").is_dir()


def test_files_that_move_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), new_files(tmp_path, last="z") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    with new_files(tmp_path, last="b") as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "a").read_text() == "new"
