"""A tensor of a GGUF file times a number, in its own type."""

from __future__ import annotations

from typing import Any

import numpy as np

# Where each block of a quantised type keeps its float16 scales, in bytes from its start, and the
# size of a block (ggml-common.h of llama.cpp). All that a block stands for is linear in these.
SCALES: dict[str, tuple[tuple[int, ...], int]] = {
    "Q4_0": ((0,), 18),
    "Q4_1": ((0, 2), 20),
    "Q5_0": ((0,), 22),
    "Q5_1": ((0, 2), 24),
    "Q8_0": ((0,), 34),
    "Q2_K": ((80, 82), 84),
    "Q3_K": ((108,), 110),
    "Q4_K": ((0, 2), 144),
    "Q5_K": ((0, 2), 176),
    "Q6_K": ((208,), 210),
    "IQ4_NL": ((0,), 18),
    "IQ4_XS": ((0,), 136),
}


def scale_tensor(data: Any, kind: str, factor: float) -> tuple[Any, str]:
    """`data` times `factor`.

    Quantised integers stay bit for bit: only the float16 scales of the blocks are multiplied, which
    costs one rounding of 2**-11. Types that are not in `SCALES` become float16.

    Args:
        data: what `gguf.GGUFReader` gives: floats, or raw bytes for quantised types.
        kind: name of its type, such as ``Q4_K``.
        factor: the number.

    Returns:
        The new data, and the name of its type.
    """
    import gguf

    if kind in ("F32", "F16"):
        return (data.astype(np.float64) * factor).astype(data.dtype), kind
    if kind in SCALES:
        offsets, size = SCALES[kind]
        blocks = np.array(data, dtype=np.uint8).reshape(-1, size)
        for at in offsets:
            scales = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)
            scaled = (scales.astype(np.float64) * factor).astype(np.float16)
            blocks[:, at : at + 2] = scaled.view(np.uint8).reshape(-1, 2)
        return blocks.reshape(data.shape), kind
    floats = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    scaled = (floats * factor).astype(np.float32)
    if kind == "BF16":
        return gguf.quants.quantize(scaled, gguf.GGMLQuantizationType.BF16), kind
    return scaled.astype(np.float16), "F16"
