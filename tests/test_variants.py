"""Every comparison that the repository ships is one that the library would accept."""

import json
from pathlib import Path

import pytest

from clex.config import ClexConfig
from clex.errors import ConfigError
from clex.training import TrainConfig

FILES = sorted((Path(__file__).parent.parent / "benchmarks" / "variants").glob("*.json"))


def check(variant: dict[str, object]) -> None:
    settings, training = variant.get("clex"), variant.get("train")
    if isinstance(settings, dict):
        ClexConfig.from_dict(settings)
    if isinstance(training, dict):
        TrainConfig(**training)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_variants_are_valid(file: Path) -> None:
    variants = json.loads(file.read_text())
    names = [variant["name"] for variant in variants]
    assert len(names) == len(set(names)) > 1
    for variant in variants:
        check(variant)


def test_there_are_some_and_bad_ones_fail() -> None:
    assert len(FILES) >= 2
    with pytest.raises(ConfigError):
        check({"clex": {"widht": 1}})
