"""Triton kernels for CUDA, each with a plain implementation beside it.

Those of a forward pass are operators of PyTorch, at which `torch.compile` never breaks its graph.
On a CPU, and where Triton is not installed or `use` has switched the kernels off, the plain
implementation runs.
"""

from .switch import active, has_kernels, use

__all__ = ["active", "has_kernels", "use"]
