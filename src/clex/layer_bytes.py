"""Bytes that one token costs in one layer of a decoder, moved and held, by the kind of training.

Counted from the operations of eager transformers layers in the Llama form: RMSNorm, seven products,
the fused rotation, SDPA and a gated feed-forward part.
"""

from __future__ import annotations

from typing import NamedTuple


class Widths(NamedTuple):
    """Bytes of one token in one layer: so many for each unit of three widths.

    Attributes:
        hidden: of the residual stream.
        heads: of queries and keys together (values are as wide as keys).
        inner: of the feed-forward part.
    """

    hidden: float
    heads: float
    inner: float

    def of(self, hidden: int, heads: int, inner: int) -> float:
        """Bytes of a token in a layer of these widths."""
        return self.hidden * hidden + self.heads * heads + self.inner * inner


class Traffic(NamedTuple):
    """What eager transformers layers do with one token, counted from their operations.

    Attributes:
        stream: bytes of one number of the residual stream.
        forward, backward: moved through memory by norms, sums, activations, rotation and casts.
        kept: held for the backward pass.
        working: held on top while the backward pass of the feed-forward part runs.
    """

    stream: float
    forward: Widths
    backward: Widths
    kept: Widths
    working: Widths


# All weights in float32 under autocast: the stream is float32, each product casts its input anew.
# Forward, hidden: 2 x 28 for the norms, 5 x 6 for casts, 2 x 10 for the sums after attention and
# feed-forward. Backward: 2 x 92 for the norms, 54 for casts and sums of five gradients, 24 for the
# rest. Kept, hidden: both norms' inputs and normalised values, five bfloat16 inputs of products.
AUTOCAST = Traffic(
    stream=4,
    forward=Widths(106, 12, 10),
    backward=Widths(262, 16, 18),
    kept=Widths(26, 8, 8),
    working=Widths(6, 0, 4),
)
# All weights gathered in bfloat16 (FSDP2): the stream is bfloat16, norms are float32 inside.
# Forward, hidden: 2 x 36 for the norms, 2 x 6 for the sums. Products share an input: two are kept,
# with a float32 and a bfloat16 copy for each norm.
SHARDED = Traffic(
    stream=2,
    forward=Widths(84, 4, 10),
    backward=Widths(190, 6, 18),
    kept=Widths(16, 4, 8),
    working=Widths(4, 0, 4),
)
# Frozen bfloat16 weights: their inputs are not kept.
FROZEN = Traffic(
    stream=2,
    forward=Widths(84, 4, 10),
    backward=Widths(174, 6, 18),
    kept=Widths(8, 4, 6),
    working=Widths(4, 0, 4),
)
# Adapters on all seven products: inputs go to float32 and back (12 bytes of each input), outputs
# are scaled and added (10 of each output), on top of FROZEN. Each keeps a bfloat16 input of its
# own.
ADAPTED = Traffic(
    stream=2,
    forward=Widths(164, 26, 42),
    backward=Widths(272, 28, 44),
    kept=Widths(18, 6, 8),
    working=Widths(4, 0, 8),
)
