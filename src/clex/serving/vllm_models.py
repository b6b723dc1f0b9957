"""vLLM's own models with the frequencies of several scales, one for each request of a batch.

The model's one rotary table becomes a stack of tables, one for each length class, and each token's
position becomes its row in the stack. Everything else of vLLM stays as it is: kernels, attention,
schedulers, CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ..errors import ConfigError, UnsupportedModelError
from .length_classes import FIRST_RUNNER, PROCESSOR, LengthClasses, shift_positions
from .vllm_requests import RequestScales, classes_of


class StackedRope(RotaryEmbedding):
    """vLLM's rotary code and kernels over the stacked table, temperatures folded in.

    Args:
        classes: what is stacked.
        head_size: entries of a head.
        dtype: of the model; the table is made in float32 and rounded once, as vLLM does.
    """

    def __init__(self, classes: LengthClasses, head_size: int, dtype: torch.dtype) -> None:
        super().__init__(
            head_size=head_size,
            rotary_dim=classes.rotary_dim,
            max_position_embeddings=sum(classes.lengths),
            base=1.0,  # the frequencies are known
            is_neox_style=True,
            dtype=dtype,
            init_cache=False,
        )
        self.register_buffer("cos_sin_cache", classes.cos_sin().to(dtype), persistent=False)


class ManyScales:
    """Mixed into a model of vLLM, before its class.

    Raises:
        ConfigError: the server was started with something that would mix scales.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        classes = classes_of(vllm_config)
        _require_settings(vllm_config, classes)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.requests = _requests_of(vllm_config)
        self.stacked_rope = _stack(self, classes, vllm_config.model_config.dtype)
        self.table_rows = sum(classes.lengths)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.shifted = torch.zeros(tokens, dtype=torch.int64)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The model's own forward pass, on row numbers in place of positions."""
        host: Any = super()
        return host.forward(
            input_ids, self._rows_of(positions), intermediate_tensors, inputs_embeds, **others
        )

    def _rows_of(self, positions: Tensor) -> Tensor:
        out = self.shifted[: len(positions)]
        metadata: Any = get_forward_context().attn_metadata
        if not metadata:  # profiling and warming up, without requests
            return out.copy_(positions)
        attention = next(iter(metadata.values()))
        starts = getattr(attention, "query_start_loc", None)
        if starts is None:
            raise UnsupportedModelError(
                f"{type(attention).__name__} does not say where each request begins; start vLLM"
                " with --attention-backend FLASH_ATTN"
            )
        return shift_positions(positions, starts, self.requests.offsets, self.table_rows, out)


def _require_settings(vllm_config: Any, classes: LengthClasses) -> None:
    """Refuse what would let requests of different scales see each other's keys, or lose rows."""
    longest = classes.lengths[-1]
    found = vllm_config.model_config.max_model_len
    if found > longest:
        raise ConfigError(f"max_model_len is {found}, and the longest class has {longest} tokens")
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "prefix caching would give a request the keys of another scale; start vLLM with"
            " --no-enable-prefix-caching"
        )
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "dual batch overlap": vllm_config.parallel_config.use_ubatching,
    }
    for name, on in refused.items():
        if on:
            raise ConfigError(f"{name} does not go with several scales in one server")
    if vllm_config.use_v2_model_runner:
        raise ConfigError(
            f"vLLM's second model runner is not supported; set {'='.join(FIRST_RUNNER)}"
        )


def _requests_of(vllm_config: Any) -> RequestScales:
    found = RequestScales.latest
    if found is None or found.vllm_config is not vllm_config:
        raise ConfigError(
            f"the scales of requests are not known; start vLLM with --logits-processors {PROCESSOR}"
        )
    return found


def _stack(model: Any, classes: LengthClasses, dtype: torch.dtype) -> StackedRope:
    """Put one stacked rotary in the place of every rotary of `model`."""
    owners = [module for module in model.modules() if hasattr(module, "rotary_emb")]
    sizes = {(m.rotary_emb.head_size, m.rotary_emb.rotary_dim) for m in owners}
    if len(sizes) != 1 or next(iter(sizes))[1] != classes.rotary_dim:
        raise UnsupportedModelError(
            f"{type(model).__name__} has rotaries of (head, rotated) entries {sorted(sizes)}, and"
            f" the export is for {classes.rotary_dim} rotated entries"
        )
    rope = StackedRope(classes, next(iter(sizes))[0], dtype)
    for owner in owners:
        owner.rotary_emb = rope
    return rope


class ClexGemma2ForCausalLM(ManyScales, Gemma2ForCausalLM):
    """Gemma 2."""


class ClexGemmaForCausalLM(ManyScales, GemmaForCausalLM):
    """Gemma."""


class ClexLlamaForCausalLM(ManyScales, LlamaForCausalLM):
    """Llama, and what is built like it."""


class ClexMistralForCausalLM(ManyScales, MistralForCausalLM):
    """Mistral."""


class ClexPhi3ForCausalLM(ManyScales, Phi3ForCausalLM):
    """Phi-3."""


class ClexQwen2ForCausalLM(ManyScales, Qwen2ForCausalLM):
    """Qwen 2."""


class ClexQwen3ForCausalLM(ManyScales, Qwen3ForCausalLM):
    """Qwen 3."""
