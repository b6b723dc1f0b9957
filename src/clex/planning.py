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
from .hf.skeleton import count_weights
from .layer_bytes import ADAPTED, AUTOCAST, FROZEN, SHARDED, Traffic

GB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU and its links, with the shares of them that training reaches.

    Attributes:
        memory: bytes.
        matmul, attention: bf16 FLOPs a second that large products, and the attention kernel, reach.
        elementwise: bytes a second that norms, rotations, activations and casts reach.
        link: bytes a second between two GPUs of one host in a collective.
        layer: seconds that launches take in one layer, forward and back, whatever its size.
        reserved: bytes that CUDA and NCCL take beside torch's allocator.
    """

    name: str
    memory: float
    matmul: float
    attention: float
    elementwise: float
    link: float
    layer: float
    reserved: float


# NVIDIA H100 80GB HBM3, eager mode, torch 2.11; its peaks are 989e12 FLOPs, 3.35e12 and 450e9 B/s.
# matmul, attention and layer are fitted to seven runs on one GPU; elementwise is the speed that
# `benchmarks.cache_move` measured for a copy; link is a third of the peak and not fitted: too
# little of it shows in the runs on two GPUs; reserved is an allowance.
H100 = Machine(
    name="H100 80 GB",
    memory=79 * GB,
    matmul=6.6e14,
    attention=4.38e14,
    elementwise=2.99e12,
    link=150e9,
    layer=0.0024,
    reserved=1.5 * GB,
)

# Bytes of one logit in all passes over it, forward, recomputed and backward; and held at most.
_LOGIT_BYTES = 52.0
_LOGIT_HELD = 14.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model decides memory and time.

    Attributes:
        attended: heads times head size.
        key_value: key-value heads times head size.
        products: of the feed-forward part: 3 where it is gated, else 2.
    """

    layers: int
    hidden: int
    attended: int
    key_value: int
    inner: int
    vocabulary: int
    tied: bool
    products: int = 3

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes of a transformers config of a dense decoder.

        Raises:
            ConfigError: the config lacks one of them, or its model has other parts, as experts.
        """
        text = config.get_text_config()
        try:
            heads = text.num_attention_heads
            head = getattr(text, "head_dim", None) or text.hidden_size // heads
            sizes = cls(
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
        count = count_weights(text)
        forms = [sizes, dataclasses.replace(sizes, products=2)]
        nearest = min(forms, key=lambda form: abs(form.weights - count))
        if abs(nearest.weights - count) <= 0.05 * count:  # biases are not counted
            return nearest
        raise ConfigError(
            f"cannot plan for {text.model_type!r}: it has {count / 1e6:,.0f} million weights, a"
            f" dense decoder of its sizes {sizes.weights / 1e6:,.0f} million"
        )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the stream, of queries and keys, of the feed-forward part."""
        return self.hidden, self.attended + self.key_value, self.inner

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return self.hidden * (
            2 * self.attended + 2 * self.key_value + self.products * self.inner + 2
        )

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
        parts = ["one GPU" if self.gpus == 1 else "FSDP2" if self.sharded else "DDP"]
        parts += [f"texts in {self.pieces} pieces"] if self.pieces > 1 else []
        parts += ["recomputing"] if self.checkpointing else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Estimate:
    """What a layout needs; bytes and seconds of one GPU.

    Attributes:
        weights, gradients, optimizer, activations, logits: bytes at the peak of torch's allocator.
        reserved: bytes beside it, of CUDA and NCCL.
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
    def allocated(self) -> float:
        """Bytes at the peak, as ``torch.cuda.max_memory_allocated`` counts them."""
        parts = self.weights, self.gradients, self.optimizer, self.activations, self.logits
        return sum(parts)

    @property
    def memory(self) -> float:
        """Bytes at the peak, all together."""
        return self.allocated + self.reserved

    @property
    def fits(self) -> bool:
        """Whether the card holds it and a twentieth is left, for fragments and errors."""
        return self.memory <= 0.95 * self.machine.memory

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
        extra = ("allocated", "memory", "fits", "seconds", "tokens_per_second")
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
        adapters = sizes.layers * rank * (ends + sizes.products * (sizes.hidden + sizes.inner))
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
    if full:
        traffic = SHARDED if layout.sharded else AUTOCAST
    else:
        traffic = ADAPTED if depth == "lora" else FROZEN
    layers = (1 + again) * traffic.forward.of(*sizes.widths) + traffic.backward.of(*sizes.widths)
    moved = sizes.layers * layers + _LOGIT_BYTES * sizes.vocabulary
    moved *= local * layout.accumulation
    # Clipping and Adam read and write weights, gradients and two moments; each pass casts weights
    # and their gradients; DDP copies gradients into its buckets and back.
    moved += trained / shards * 40.0
    moved += trained * layout.accumulation * 6.0 * (2 + again)
    buckets = layout.gpus > 1 and not layout.sharded
    moved += 16.0 * trained if buckets else 0.0
    compute = (
        linear / machine.matmul
        + attention / machine.attention
        + moved / machine.elementwise
        + machine.layer * sizes.layers * layout.accumulation
    )

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

    held = 4.0 * sizes.weights if full else 2.0 * sizes.weights + 4.0 * adapters
    activations, logits, gradients, copies = _peak(sizes, layout, traffic, local, trained)
    return Estimate(
        layout=layout,
        machine=machine,
        weights=held / shards + copies,
        gradients=gradients,
        optimizer=8.0 * trained / shards,
        activations=activations,
        logits=logits,
        reserved=machine.reserved,
        linear_flops=linear,
        attention_flops=attention,
        moved=moved,
        communication=sent,
        compute=compute,
        waiting=waiting,
        tokens=length * passes * (layout.gpus // layout.pieces),
    )


def _peak(
    sizes: Sizes, layout: Layout, traffic: Traffic, local: float, trained: int
) -> tuple[float, float, float, float]:
    """Bytes of activations, logits, gradients and copies of weights when their sum is largest."""
    full = trained == sizes.weights
    shards = layout.gpus if layout.sharded else 1
    layer = local * traffic.kept.of(*sizes.widths)
    working = local * traffic.working.of(*sizes.widths)
    stream = local * sizes.hidden * traffic.stream
    between = stream if layout.checkpointing else layer  # what a layer leaves for the way back
    everything = sizes.layers * between
    ends = 4 * stream  # around the embedding, the last norm and the head

    embedding = sizes.embedding * (1 if sizes.tied else 2)
    if layout.sharded:  # the embedding and two layers gathered
        copies = least = 2.0 * (2 * sizes.layer + embedding)
    elif full:  # autocast's bfloat16 weights, which activations hold on to
        copies, least = 2.0 * sizes.weights, 2.0 * sizes.layer
    else:
        copies = least = 0.0
    all_gradients = 4.0 * trained / shards
    # The first that comes is that of the head.
    first = 4.0 * sizes.embedding / shards if full else 0.0
    first = all_gradients if layout.accumulation > 1 else first
    if layout.sharded:  # FSDP2 keeps it whole, in bfloat16, to the end of the pass
        beside = 2.0 * sizes.embedding if full else 0.0
    else:  # DDP has its buckets
        beside = 4.0 * trained if layout.gpus > 1 else 0.0

    recomputed = layer if layout.checkpointing else 0.0
    logits = _LOGIT_HELD * min(LOGITS_AT_ONCE, local * sizes.vocabulary)
    in_layer = least if layout.checkpointing else copies
    moments = (
        # In the loss; in the backward pass of the last layer; in that of the first.
        (everything + ends, logits, first + beside, copies),
        (everything + recomputed + working, 0.0, first + beside, in_layer),
        (between + recomputed + working, 0.0, all_gradients + beside, in_layer),
    )
    return max(moments, key=sum)


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
