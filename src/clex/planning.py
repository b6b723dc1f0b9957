"""What a training run needs before it is started: memory, arithmetic, communication, time.

The arithmetic is counted exactly; how fast a GPU does it comes from the constants below, which were
fitted to measured runs (docs/scale_out.md names them). All sizes are those of one GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .hf.loss import LOGITS_AT_ONCE

GB = 2**30


@dataclass(frozen=True)
class Machine:
    """One GPU and its links, with the shares of them that training reaches.

    Attributes:
        memory: bytes.
        matmul, attention: bf16 FLOPs a second that large products, and the attention kernel, reach.
        elementwise: bytes a second that norms, rotations, activations and casts reach.
        link: bytes a second between two GPUs of one host in a collective.
        step: seconds of a step that no size explains: launches, optimiser, waiting.
        reserved: bytes that CUDA, NCCL and fragments take.
    """

    name: str
    memory: float
    matmul: float
    attention: float
    elementwise: float
    link: float
    step: float
    reserved: float


# NVIDIA H100 80GB HBM3, eager mode, torch 2.11: not fitted yet, but set from the 58,385 tokens/s of
# SmolLM2 at 8k and the usual shares of the peak (989e12 FLOPs, 3.35e12 B/s, 450e9 B/s).
H100 = Machine("H100 80 GB", 79 * GB, 500e12, 330e12, 1.6e12, 150e9, 0.02, 1.5 * GB)

# Bytes that one token moves through one layer in elementwise operations, forward, over its widths.
_ELEMENTWISE_HIDDEN = 150.0
_ELEMENTWISE_INNER = 24.0
# Bytes of one logit in all passes over it, forward, recomputed and backward.
_LOGIT_BYTES = 52.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model decides memory and time.

    Attributes:
        attended: heads times head size.
        key_value: key-value heads times head size.
    """

    layers: int
    hidden: int
    attended: int
    key_value: int
    inner: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes of a transformers config of a dense decoder.

        Raises:
            ConfigError: the config lacks one of them.
        """
        text = config.get_text_config()
        try:
            heads = text.num_attention_heads
            head = getattr(text, "head_dim", None) or text.hidden_size // heads
            return cls(
                layers=text.num_hidden_layers,
                hidden=text.hidden_size,
                attended=heads * head,
                key_value=(getattr(text, "num_key_value_heads", None) or heads) * head,
                inner=text.intermediate_size,
                vocabulary=text.vocab_size,
                tied=bool(getattr(text, "tie_word_embeddings", False)),
            )
        except AttributeError as error:
            raise ConfigError(f"cannot plan for {text.model_type!r}: {error}") from None

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return self.hidden * (2 * self.attended + 2 * self.key_value + 3 * self.inner + 2)

    @property
    def embedding(self) -> int:
        """Weights of the input embedding, or of the output head."""
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is cut.

    Attributes:
        gpus: all of them.
        pieces: GPUs that each text is cut across.
        sharded: weights, gradients and optimiser are cut across all GPUs (FSDP2, ZeRO-3).
        checkpointing: activations are computed again in the backward pass.
        batch: windows of one group of `pieces` GPUs in a forward pass.
        accumulation: forward passes in a step.
    """

    gpus: int = 1
    pieces: int = 1
    sharded: bool = False
    checkpointing: bool = True
    batch: int = 1
    accumulation: int = 1

    def __str__(self) -> str:
        parts = [] if self.gpus == 1 else ["FSDP2" if self.sharded else "DDP"]
        parts += [f"texts in {self.pieces} pieces"] if self.pieces > 1 else []
        parts += ["recomputing"] if self.checkpointing else []
        return ", ".join(parts) or "one GPU"


@dataclass(frozen=True)
class Estimate:
    """What a layout needs; bytes and seconds of one GPU.

    Attributes:
        weights, gradients, optimizer, activations, logits, reserved: bytes at the peak.
        linear_flops, attention_flops: of a step.
        moved: bytes that elementwise operations and the optimiser move in a step.
        communication: bytes sent in a step.
        compute, waiting: seconds of a step; waiting is communication that nothing hides.
        tokens: of a step, of all GPUs.
    """

    layout: Layout
    machine: Machine
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserved: float
    linear_flops: float
    attention_flops: float
    moved: float
    communication: float
    compute: float
    waiting: float
    tokens: int

    @property
    def memory(self) -> float:
        """Bytes at the peak."""
        parts = self.weights, self.gradients, self.optimizer, self.activations, self.logits
        return sum(parts) + self.reserved

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.memory <= self.machine.memory

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.waiting

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the derived numbers included."""
        values = dataclasses.asdict(self)
        values["machine"] = self.machine.name
        extra = ("memory", "fits", "seconds", "tokens_per_second")
        return {**values, **{name: getattr(self, name) for name in extra}}


def estimate(
    sizes: Sizes,
    length: int,
    depth: str,
    layout: Layout,
    *,
    rank: int = 16,
    machine: Machine = H100,
) -> Estimate:
    """Memory and time of one step.

    Args:
        sizes: of the model.
        length: tokens of a window.
        depth: ``"dynamics"``, ``"lora"`` or ``"full"`` (`clex.training`).
        layout: how the run is cut.
        rank: of the adapters.
        machine: the GPU.
    """
    full, passes = depth == "full", layout.batch * layout.accumulation
    local = length * layout.batch / layout.pieces  # tokens of one GPU in a forward pass
    shards = layout.gpus if layout.sharded else 1
    adapters = 0
    if depth == "lora":
        ends = 4 * sizes.hidden + 2 * sizes.attended + 2 * sizes.key_value
        adapters = sizes.layers * rank * (ends + 3 * (sizes.hidden + sizes.inner))
    trained = sizes.weights if full else adapters

    # Forward once, backward twice (once where weights are frozen), forward again to recompute.
    forward = 2.0 * sizes.layers * sizes.layer
    again = 1 if layout.checkpointing else 0
    times = 1 + again + (2 if full else 1)
    head = 2.0 * sizes.embedding * (2 + (2 if full else 1))  # its forward is always done twice
    linear = local * layout.accumulation * (forward * times + head)
    # A causal product is half a square; the backward pass has five products to the forward's two.
    square = 2.0 * length * length * sizes.attended * sizes.layers
    attention = square * (1 + again + 2.5) * passes / layout.pieces
    widths = _ELEMENTWISE_HIDDEN * sizes.hidden + _ELEMENTWISE_INNER * sizes.inner
    # What runs from layer to layer: float32 under autocast, bfloat16 where weights are that.
    stream = 4.0 if full and not layout.sharded else 2.0
    moved = sizes.layers * widths * (3 + again) * stream / 4 + _LOGIT_BYTES * sizes.vocabulary
    moved *= local * layout.accumulation
    # Adam reads and writes weights, gradients and two moments; the cast copy is made in each pass.
    moved += trained / shards * (28.0 + 6.0 * layout.accumulation)
    compute = (
        linear / machine.matmul
        + attention / machine.attention
        + moved / machine.elementwise
        + machine.step
    )

    held = 4.0 if full else 2.0
    sent, hidden_share = 0.0, 0.8
    others = (layout.gpus - 1) / layout.gpus
    if layout.sharded:
        # Gathered in bfloat16 for the forward and the backward pass; gradients added in float32.
        sent = others * layout.accumulation * (2 * 2.0 * sizes.weights + 4.0 * trained)
    elif layout.gpus > 1:
        sent = 2 * others * 4.0 * trained
    if layout.pieces > 1:
        # Keys and values go round once forward (and recomputed), with their gradients twice back.
        around = 2.0 * 2 * sizes.key_value * sizes.layers * local * (layout.pieces - 1)
        sent += around * (1 + again + 2) * layout.accumulation
    waiting = sent / machine.link * (1 - hidden_share)

    one_layer = local * (
        sizes.hidden * (6 * stream + 8) + (sizes.attended + sizes.key_value) * 16 + sizes.inner * 10
    )
    kept = local * sizes.hidden * stream if layout.checkpointing else one_layer
    activations = sizes.layers * kept + (one_layer * 1.5 if layout.checkpointing else 0)
    activations += local * sizes.hidden * 4 * stream
    gathered = 2.0 * (2 * sizes.layer + 2 * sizes.embedding) if layout.sharded else 0.0
    cast = 2.0 * sizes.weights if full and not layout.sharded else 0.0
    buckets = 4.0 * trained if layout.gpus > 1 and not layout.sharded else 0.0
    return Estimate(
        layout=layout,
        machine=machine,
        weights=(held * sizes.weights + 4.0 * adapters) / shards + gathered + cast,
        gradients=4.0 * trained / shards + buckets,
        optimizer=8.0 * trained / shards,
        activations=activations,
        logits=min(LOGITS_AT_ONCE, local * sizes.vocabulary) * 4.0 * 4,
        reserved=machine.reserved,
        linear_flops=linear,
        attention_flops=attention,
        moved=moved,
        communication=sent,
        compute=compute,
        waiting=waiting,
        tokens=length * passes * (layout.gpus // layout.pieces),
    )


def layouts(gpus: int, length: int, batch: int = 1) -> list[Layout]:
    """The ways to cut a run over `gpus` that are worth a look, the simplest first."""
    found = []
    for checkpointing in (False, True):
        found.append(Layout(gpus=gpus, checkpointing=checkpointing, batch=batch))
        pieces = 1
        while gpus > 1 and pieces <= gpus:
            if gpus % pieces == 0 and length % (2 * pieces) == 0:
                found.append(
                    Layout(
                        gpus=gpus,
                        pieces=pieces,
                        sharded=True,
                        checkpointing=checkpointing,
                        batch=batch,
                    )
                )
            pieces *= 2
    return found


def best(estimates: list[Estimate]) -> Estimate | None:
    """The fastest that fits; of those within 3 % of it the one that was listed first."""
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        return None
    most = max(e.tokens_per_second for e in fitting)
    return next(e for e in fitting if e.tokens_per_second >= 0.97 * most)
