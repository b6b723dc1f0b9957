"""Which families can be exported: where each keeps its queries, and which engines run it right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnsupportedModelError

Target = Literal["hf", "vllm", "gguf"]
QueryForm = Literal["projection", "norm", "first_rows", "head_blocks"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family stores its queries, and what engines do with it.

    Attributes:
        module: name of the module in each attention block that the temperature goes into.
        form: ``projection``: a query matrix of its own. ``norm``: a norm on the queries, which
            undoes any factor on the matrix before it. ``first_rows``: queries, keys and values in
            one matrix, in this order. ``head_blocks``: the same, but for each head in turn.
        vllm: ``native``: vLLM has its own class for it. ``transformers``: it runs through vLLM's
            transformers backend, which can hold one scale but not two.
        vllm_refusal: why vLLM cannot run it, if it cannot.
        gguf: whether it is arch ``llama`` of llama.cpp but for names and order.
    """

    module: str = "q_proj"
    form: QueryForm = "projection"
    vllm: Literal["native", "transformers"] = "native"
    vllm_refusal: str = ""
    gguf: bool = False


_INTERLEAVED = "vLLM takes factors only for rotary halves, and this family rotates pairs"

# By model_type. A family is here when a test holds its export against the live model.
FAMILIES: dict[str, Family] = {
    "llama": Family(gguf=True),
    "mistral": Family(gguf=True),
    "qwen2": Family(gguf=True),
    "qwen3": Family(module="q_norm", form="norm"),
    "phi3": Family(module="qkv_proj", form="first_rows"),
    "gemma": Family(),
    "gemma2": Family(),
    "olmo2": Family(module="q_norm", form="norm", vllm="transformers"),
    "cohere": Family(vllm_refusal=_INTERLEAVED),
    "glm": Family(vllm_refusal=_INTERLEAVED),
    "stablelm": Family(vllm_refusal="vLLM's own class for it was not tried with factors"),
    "phi": Family(vllm="transformers"),
    "gpt_neox": Family(module="query_key_value", form="head_blocks", vllm="transformers"),
}

# Why llama.cpp cannot, where the reason is worth more than "not in the list".
_GGUF_REFUSALS = {
    "gpt_neox": "its graph for gptneox takes no frequency factors",
    "qwen3": "its graph for qwen3 takes no frequency factors, and arch llama has no place for the"
    " query norm",
    "phi3": "its graph for phi3 knows only longrope with two sets of factors",
}

# Settings that put a norm on the queries of a family that has none as a rule.
_QUERY_NORMS = ("qk_layernorm", "use_qk_norm")


def family_of(config: Any, target: Target) -> Family:
    """The family of a model, if `target` runs it right.

    Args:
        config: the config of transformers.
        target: what will read the export.

    Raises:
        UnsupportedModelError: it does not; the message says why, and what would.
    """
    name = config.model_type
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"no export is checked for model_type {name!r} (valid: {', '.join(sorted(FAMILIES))})"
        )
    family = FAMILIES[name]
    norms = [key for key in _QUERY_NORMS if getattr(config, key, False)]
    if norms:
        raise UnsupportedModelError(
            f"{name} with {norms[0]}: its query norm would undo the temperature, and this form is"
            " not checked"
        )
    if target == "vllm" and family.vllm_refusal:
        raise UnsupportedModelError(f"{name} in vLLM: {family.vllm_refusal}; use --target hf")
    if target == "gguf" and not family.gguf:
        reason = _GGUF_REFUSALS.get(name, f"its graph for {name} takes no frequency factors")
        raise UnsupportedModelError(f"{name} in llama.cpp: {reason}; use --target vllm or hf")
    if target == "gguf":
        _require_llama_graph(config)
    return family


def _require_llama_graph(config: Any) -> None:
    """What arch llama of llama.cpp does not do, and would leave out without a word."""
    name = config.model_type
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"{name} with hidden_act {activation!r}: arch llama has silu")
    sliding = getattr(config, "sliding_window", None)
    if sliding and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{name} with sliding_window {sliding}: arch llama of llama.cpp attends to everything"
        )
