"""Scaling methods, one file each. A new file that registers a class is found by itself."""

from .base import Scaling, get_scaling, register_scaling, scaling_methods

__all__ = ["Scaling", "get_scaling", "register_scaling", "scaling_methods"]
