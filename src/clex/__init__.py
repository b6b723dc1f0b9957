"""clex: make a RoPE language model read further than it was trained to.

    model = clex.extend(model, clex.ClexConfig(max_scale=8))
    ...  # train, or: model = clex.load("folder")
    model.generate(...)

Names are loaded when they are first used, so that ``import clex`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import ClexConfig as ClexConfig
    from .errors import ClexError as ClexError
    from .hf.checkpoint import load as load
    from .hf.checkpoint import save as save
    from .hf.extend import at_scale as at_scale
    from .hf.extend import extend as extend
    from .hf.extend import frequencies as frequencies
    from .hf.extend import restore as restore
    from .hf.session import Session as Session
    from .rope import RopeSpec as RopeSpec
    from .scaling import Scaling as Scaling
    from .scaling import get_scaling as get_scaling
    from .scaling import register_scaling as register_scaling

_HOME = {
    "ClexConfig": "config",
    "ClexError": "errors",
    "RopeSpec": "rope",
    "Scaling": "scaling",
    "Session": "hf.session",
    "at_scale": "hf.extend",
    "extend": "hf.extend",
    "frequencies": "hf.extend",
    "get_scaling": "scaling",
    "load": "hf.checkpoint",
    "register_scaling": "scaling",
    "restore": "hf.extend",
    "save": "hf.checkpoint",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clex' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
