"""Triton kernels for CUDA, each behind an operator of PyTorch with a plain implementation.

`torch.compile` sees operators and never breaks its graph at them. On a CPU, and where Triton is not
installed or `use` has switched the kernels off, the plain implementation runs.
"""

from .switch import active, has_kernels, use

__all__ = ["active", "has_kernels", "use"]
