"""What vLLM calls in each of its processes (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations

from .length_classes import ARCHITECTURES, PREFIX


def register() -> None:
    """Make the architectures of exports with several scales known. Imports no model."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(f"{PREFIX}{name}", f"{__package__}.vllm_models:{PREFIX}{name}")
