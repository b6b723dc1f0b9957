"""GGUF files, read back with gguf and run by llama.cpp, against the live model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exports
import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import clex
from clex.errors import CheckpointError, ConfigError, UnsupportedModelError
from clex.export import export
from clex.export.gguf_blocks import SCALES, scale_tensor
from clex.export.gguf_file import Field, GgufTensor, write_gguf

xllamacpp = pytest.importorskip("xllamacpp")

TOLERANCE = 2e-3
FLOAT = gguf.GGUFValueType.FLOAT32
STRING = gguf.GGUFValueType.STRING


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `llama` at t = 4."""
    out = tmp_path_factory.mktemp("converted") / "out"
    exports.write_export(llama, out, "gguf")
    return out / "model.gguf"


class LlamaCpp:
    """A server on a file; answers the distribution after a prompt."""

    def __init__(self, file: Path, **settings: Any) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for name, value in settings.items():
            setattr(params, name, value)
        self.server = xllamacpp.Server(params)
        self.reused = 0

    def after(self, ids: list[int] | str, **request: Any) -> Tensor:
        # A set next token, since it tells nothing where that is half a letter; the probabilities
        # that it tells are those from before.
        wanted = {"n_predict": 1, "n_probs": 1 << 20, "logit_bias": [["a", 1000.0]]}
        answer = self.server.handle_completions({"prompt": ids, **wanted, **request})
        self.reused = answer["timings"]["cache_n"]
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        result = torch.zeros(len(top), dtype=torch.float64)
        for entry in top:
            result[entry["id"]] = entry["logprob"]
        return result.log_softmax(-1)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., LlamaCpp]]:
    """Opens servers, and closes them when the module's tests are done."""
    opened: list[LlamaCpp] = []

    def open_file(file: Path, **settings: Any) -> LlamaCpp:
        opened.append(LlamaCpp(file, **settings))
        return opened[-1]

    yield open_file
    opened.clear()


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors by name."""
    reader = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


def rewrite(
    source: Path,
    path: Path,
    *,
    arch: str | None = None,
    without: tuple[str, ...] = (),
    fields: tuple[Field, ...] = (),
    tensors: tuple[tuple[str, Any, str], ...] = (),
) -> Path:
    """A copy of a GGUF file with some fields and tensors changed, for the traps."""
    reader = gguf.GGUFReader(source)
    old = str(reader.fields["general.architecture"].contents())
    arch = arch or old
    new = {name for name, _, _ in tensors}
    kept = [
        Field(
            name.replace(f"{old}.", f"{arch}.", 1),
            field.contents(),
            field.types[0],
            field.types[-1] if len(field.types) > 1 else None,
        )
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general.architecture", *without))
        and name not in {f.name for f in fields}
    ]
    rows = [
        (t.name, t.data, t.tensor_type.name)
        for t in reader.tensors
        if t.name not in new and not t.name.startswith(without or ("\0",))
    ] + list(tensors)

    def tensor(name: str, data: Any, kind: str) -> GgufTensor:
        return GgufTensor(name, data.shape, kind, data.dtype, lambda: data)

    write_gguf(path, arch, [*kept, *fields], [tensor(*row) for row in rows])
    return path


@pytest.fixture(scope="module")
def base_file(converted: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain model as GGUF: as a user has it, before anything was done to it."""
    queries = []
    for i, layer in enumerate(exports.plain(llama).model.layers):
        weight = layer.self_attn.q_proj.weight.detach()
        paired = weight.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
        queries.append((f"blk.{i}.attn_q.weight", paired.numpy().copy(), "F32"))
    length = Field("llama.context_length", 64, gguf.GGUFValueType.UINT32)
    return rewrite(
        converted,
        tmp_path_factory.mktemp("base") / "base.gguf",
        without=("clex.", "rope_freqs"),
        fields=(length,),
        tensors=tuple(queries),
    )


def live_after(source: Path, ids: list[int], t: float | None = 4) -> Tensor:
    """The live model's distribution after a prompt; the plain model's where t is None."""
    batch = torch.tensor([ids])
    if t is None:
        return exports.log_probs(exports.plain(source), batch)[0, -1].double()
    return exports.live(source, batch, t)[0, -1].double()


def lengthened(base_file: Path, folder: Path) -> Path:
    """The plain model, but with the context length of the export."""
    length = Field("llama.context_length", 256, gguf.GGUFValueType.UINT32)
    return rewrite(base_file, folder / "lengthened.gguf", fields=(length,))


IDS = exports.make_ids(255)[0].tolist()


def test_llama_cpp_runs_the_live_model_up_to_the_last_token(
    llama: Path, converted: Path, base_file: Path, tmp_path: Path, run: Callable[..., LlamaCpp]
) -> None:
    server, plain = run(converted), run(lengthened(base_file, tmp_path))
    for length in (20, 64, 128, 255):
        ids = IDS[:length]
        found, wanted = server.after(ids), live_after(llama, ids)
        assert exports.difference(found, wanted) < TOLERANCE
        assert int(found.argmax()) == int(wanted.argmax())
        assert exports.difference(plain.after(ids), live_after(llama, ids, None)) < TOLERANCE
    assert exports.difference(found, plain.after(IDS)) > 100 * TOLERANCE


def test_an_old_context_length_would_refuse_long_prompts(
    base_file: Path, run: Callable[..., LlamaCpp]
) -> None:
    server = run(base_file)
    assert len(server.after(IDS[:60]))
    with pytest.raises(KeyError):
        server.after(IDS)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_families_as_arch_llama(
    family: str, tmp_path: Path, run: Callable[..., LlamaCpp]
) -> None:
    """qwen2 has biases on queries and keys, which its own arch would run without factors."""
    source = exports.write_model(tmp_path / family, family)
    exports.write_export(source, tmp_path / "out", "gguf")
    found = run(tmp_path / "out" / "model.gguf").after(IDS)
    assert exports.difference(found, live_after(source, IDS)) < TOLERANCE
    assert exports.difference(found, live_after(source, IDS, None)) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_width_weights(
    dtype: str, llama: Path, tmp_path: Path, run: Callable[..., LlamaCpp]
) -> None:
    record = exports.write_export(llama, tmp_path / "out", "gguf", dtype=dtype)
    assert record.weights == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    found = run(tmp_path / "out" / "model.gguf").after(IDS)
    assert (found - live_after(llama, IDS)).abs().mean() < 0.1
    assert (found - live_after(llama, IDS, None)).abs().mean() > 0.3
    tensors = read(tmp_path / "out" / "model.gguf")[1]
    assert tensors["rope_freqs.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_copied_file_is_the_live_model(
    llama: Path, base_file: Path, tmp_path: Path, run: Callable[..., LlamaCpp]
) -> None:
    record = exports.write_export(llama, tmp_path / "out", "gguf", gguf=base_file)
    file = tmp_path / "out" / "model.gguf"
    assert exports.difference(run(file).after(IDS), live_after(llama, IDS)) < TOLERANCE
    old, new = read(base_file), read(file)
    for name, tensor in old[1].items():
        same = np.array_equal(tensor.data, new[1][name].data)
        assert same == (".attn_q." not in name), name
    factors = new[1].pop("rope_freqs.weight")
    assert np.array_equal(factors.data, np.array(record.factors, dtype=np.float32))
    assert new[1].keys() == old[1].keys()
    changed = {name for name, value in new[0].items() if old[0].get(name) != value}
    assert {n for n in changed if not n.startswith(("GGUF.", "clex."))} == {"llama.context_length"}
    assert new[0]["llama.context_length"] == 256


def test_tokens_are_kept(converted: Path, base_file: Path, tmp_path: Path) -> None:
    fields = read(converted)[0]
    tokenizer = exports.make_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(exports.VOCAB)))
    assert fields["tokenizer.ggml.tokens"] == [*tokens, *(f"[PAD{i}]" for i in range(300, 304))]
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_llama_cpp_cuts_text_into_the_same_tokens(
    converted: Path, run: Callable[..., LlamaCpp]
) -> None:
    server, tokenizer = run(converted), exports.make_tokenizer()
    for text in (exports.WORDS, "  It's 1234,\n\nthe  sea—ünïcode!", "x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # One more or another token would move this by whole nats.
        assert exports.difference(server.after(text), server.after(ids)) < 1e-4


def test_scaling_keys_and_old_factors_are_replaced(
    llama: Path, base_file: Path, tmp_path: Path, run: Callable[..., LlamaCpp]
) -> None:
    """A base of the llama3 kind has rope_freqs already; others bring keys of rope.scaling."""
    dirty = rewrite(
        base_file,
        tmp_path / "dirty.gguf",
        fields=(
            Field("llama.rope.scaling.type", "yarn", STRING),
            Field("llama.rope.scaling.factor", 4.0, FLOAT),
            Field("llama.rope.scaling.attn_factor", 1.4, FLOAT),
            Field("llama.rope.scaling.yarn_attn_factor", 1.4, FLOAT),
        ),
        tensors=(("rope_freqs.weight", np.full(8, 3.0, dtype=np.float32), "F32"),),
    )
    exports.write_export(llama, tmp_path / "out", "gguf", gguf=dirty)
    fields, tensors = read(tmp_path / "out" / "model.gguf")
    assert not [name for name in fields if ".rope.scaling" in name]
    assert not [name for name in fields if "attn_factor" in name or "attention.scale" in name]
    assert [name for name in tensors if name.startswith("rope_")] == ["rope_freqs.weight"]
    found = run(tmp_path / "out" / "model.gguf").after(IDS)
    assert exports.difference(found, live_after(llama, IDS)) < TOLERANCE


def test_no_scaling_key_is_ever_written(converted: Path) -> None:
    own = [name for name in read(converted)[0] if not name.startswith("clex.")]
    assert not [n for n in own if n.endswith("attention.scale")]
    assert not [n for n in own if "scaling" in n or "attn_factor" in n]


def test_a_base_of_the_llama3_kind(tmp_path: Path, run: Callable[..., LlamaCpp]) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = exports.write_model(tmp_path / "base", rope_parameters=rope)
    exports.write_export(source, tmp_path / "out", "gguf")
    found = run(tmp_path / "out" / "model.gguf").after(IDS)
    assert exports.difference(found, live_after(source, IDS)) < TOLERANCE


def test_many_slots_run_the_same_scale(
    llama: Path, converted: Path, run: Callable[..., LlamaCpp]
) -> None:
    """llama.cpp chooses between two sets of factors by the context of each slot; one has none."""
    server = run(converted, n_parallel=4, n_ctx=1024)
    assert exports.difference(server.after(IDS[:200]), live_after(llama, IDS[:200])) < TOLERANCE


def test_shifted_keys_keep_their_temperature(tmp_path: Path, run: Callable[..., LlamaCpp]) -> None:
    """llama.cpp reuses keys at other positions, and applies an attention factor to them again.

    With one layer, keys and values know nothing of the tokens before them, so that reused ones
    must give what fresh ones give.
    """
    source = exports.write_model(tmp_path / "one", num_hidden_layers=1)
    exports.write_export(source, tmp_path / "out", "gguf")
    file = tmp_path / "out" / "model.gguf"
    start, tail = IDS[:40], IDS[40:200]

    def shifted(file: Path) -> tuple[Tensor, Tensor]:
        server = run(file, n_cache_reuse=16)
        server.after(start + tail)
        found = server.after(start[:4] + tail)
        assert server.reused > 100, "nothing was reused: this proves nothing"
        return found, server.after(start[:4] + tail, cache_prompt=False)

    found, fresh = shifted(file)
    wanted = live_after(source, start[:4] + tail)
    assert exports.difference(fresh, wanted) < TOLERANCE
    assert exports.difference(found, wanted) < TOLERANCE
    # The form that is never written: right when fresh, wrong when shifted.
    clean = exports.plain(source)
    weight = clean.model.layers[0].self_attn.q_proj.weight.detach()
    paired = weight.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).numpy().copy()
    factor = Field("llama.rope.scaling.attn_factor", 1.1386294, FLOAT)
    bad = rewrite(
        file,
        tmp_path / "bad.gguf",
        fields=(factor,),
        tensors=(("blk.0.attn_q.weight", paired, "F32"),),
    )
    found, fresh = shifted(bad)
    assert exports.difference(fresh, wanted) < TOLERANCE
    assert exports.difference(found, wanted) > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "phi3", "gemma", "olmo2", "stablelm"])
def test_deaf_families_are_refused(family: str, tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / family, family)
    with pytest.raises(UnsupportedModelError, match="in llama"):
        exports.write_export(source, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", ["qwen2", "gptneox", "pangu-embed"])
def test_files_of_deaf_architectures_are_refused(
    arch: str, llama: Path, base_file: Path, tmp_path: Path
) -> None:
    other = rewrite(base_file, tmp_path / "other.gguf", arch=arch)
    with pytest.raises(UnsupportedModelError, match=arch):
        exports.write_export(llama, tmp_path / "out", "gguf", gguf=other)


def test_settings_that_arch_llama_would_leave_out_are_refused(tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "sliding", "mistral", sliding_window=32)
    with pytest.raises(UnsupportedModelError, match="sliding_window"):
        exports.write_export(source, tmp_path / "out", "gguf")


def test_an_attention_factor_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cache shift"):
        exports.write_export(llama, tmp_path / "out", "gguf", form="keep_weights")


def test_an_export_is_not_exported_again(llama: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already"):
        exports.write_export(llama, tmp_path / "out", "gguf", gguf=converted)


@pytest.mark.parametrize(
    "fields",
    [
        Field("llama.rope.freq_base", 5e5, FLOAT),
        Field("llama.block_count", 3, gguf.GGUFValueType.UINT32),
    ],
    ids=lambda field: field.name,
)
def test_a_file_of_another_model_is_refused(
    fields: Field, llama: Path, base_file: Path, tmp_path: Path
) -> None:
    other = rewrite(base_file, tmp_path / "other.gguf", fields=(fields,))
    with pytest.raises(CheckpointError, match="of another model"):
        exports.write_export(llama, tmp_path / "out", "gguf", gguf=other)


def test_a_file_of_another_training_is_refused(
    llama: Path, base_file: Path, tmp_path: Path
) -> None:
    norm = (exports.plain(llama).model.norm.weight.detach() * 1.01).numpy().copy()
    other = rewrite(
        base_file, tmp_path / "other.gguf", tensors=(("output_norm.weight", norm, "F32"),)
    )
    with pytest.raises(CheckpointError, match="another training"):
        exports.write_export(llama, tmp_path / "out", "gguf", gguf=other)


def test_trained_weights_do_not_go_into_a_file_of_the_base(
    llama: Path, base_file: Path, tmp_path: Path
) -> None:
    model = clex.extend(exports.plain(llama), clex.ClexConfig(max_scale=8, steps=4))
    clex.save(model, tmp_path / "dir", tokenizer=exports.make_tokenizer())
    with pytest.raises(ConfigError, match="weights of its own"):
        export(tmp_path / "dir", tmp_path / "out", target="gguf", scale=4, gguf=base_file)


def test_an_unknown_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "base")
    text = (source / "tokenizer.json").read_text()
    spaced = text.replace('"add_prefix_space": false', '"add_prefix_space": true')
    assert spaced != text
    (source / "tokenizer.json").write_text(spaced)
    with pytest.raises(UnsupportedModelError, match="convert_hf_to_gguf"):
        exports.write_export(source, tmp_path / "out", "gguf")


def test_quantising_needs_the_tool(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="llama-quantize"):
        exports.write_export(llama, tmp_path / "out", "gguf", quantize="Q8_0")


def test_the_tool_gets_the_finished_file(
    llama: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$3" = Q8_0 ] || { echo "bad type $3" >&2; exit 1; }\ncp $1 $2\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/bin:/usr/bin")
    record = exports.write_export(llama, tmp_path / "out", "gguf", quantize="Q8_0")
    assert record.weights == "Q8_0"
    assert (tmp_path / "out" / "model.gguf").read_bytes() == converted.read_bytes()
    with pytest.raises(CheckpointError, match="bad type Q9"):
        exports.write_export(llama, tmp_path / "other", "gguf", quantize="Q9")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", [*SCALES, "F32", "F16", "BF16"])
def test_tensors_are_scaled_in_their_own_type(kind: str) -> None:
    generator = np.random.default_rng(0)
    floats = generator.normal(size=(4, 512)).astype(np.float32)
    wanted_type = gguf.GGMLQuantizationType[kind]
    if kind in SCALES:
        offsets, size = SCALES[kind]
        data = generator.integers(0, 256, size=(32, size), dtype=np.uint8)
        for at in offsets:
            scales = generator.uniform(0.01, 0.1, size=(32, 1)).astype(np.float16)
            data[:, at : at + 2] = scales.view(np.uint8)
        assert gguf.GGML_QUANT_SIZES[wanted_type][1] == size
    else:
        data = gguf.quants.quantize(floats, wanted_type)
    scaled, after = scale_tensor(data, kind, 1.3)
    assert after == kind and scaled.shape == data.shape and scaled.dtype == data.dtype
    before = gguf.quants.dequantize(data, wanted_type)
    found = gguf.quants.dequantize(scaled, wanted_type)
    # Two scales of a block round on their own, and what they give may cancel.
    largest = np.abs(before).reshape(32, -1).max() if kind in SCALES else np.abs(before)
    allowed = {"F32": 1e-6, "BF16": 2**-8}.get(kind, 2**-10)
    assert (np.abs(found - 1.3 * before) <= allowed * 1.3 * largest + 1e-7).all()
    assert not np.allclose(found, before, rtol=0.1)


def test_types_without_known_scales_become_half_width() -> None:
    data = np.zeros((2, 54), dtype=np.uint8)
    data[:, :] = np.random.default_rng(0).integers(0, 256, size=(2, 54), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType.TQ1_0
    data[:, 52:54] = np.full((2, 1), 0.5, dtype=np.float16).view(np.uint8)
    scaled, after = scale_tensor(data, "TQ1_0", 1.5)
    assert after == "F16" and scaled.dtype == np.float16
    assert np.allclose(scaled, 1.5 * gguf.quants.dequantize(data, kind), rtol=1e-3)
