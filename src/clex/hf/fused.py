"""The seam of the fused rotation: one name inside a host's attention, rebound on its instances.

A decoder computes (cos, sin) once and hands the pair, unopened, to every layer, where attention
calls the function `apply_rotary_pos_emb` of its modeling file. Here each attention instance moves
to a subclass whose `forward` is the host's own code with that one name bound to the fused rotation,
and the pair becomes (positions, `Angles`). Classes, modeling files and other models stay as they
are.

An instance is fused where an experiment finds the same numbers as the host's, bit for bit. Others
get cos and sin as ever.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.rotary import rotate

_APPLY = "apply_rotary_pos_emb"
_HOST = "clex_host"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


class Angles(NamedTuple):
    """Stands where sin stood in the pair; positions (B or 1, T) stand where cos stood.

    Attributes:
        inv_freq: (B or 1, F) float32; (B or 1, layers, F) before each layer took its own.
        factor: (B or 1,) float32, on cos and sin; (B or 1, layers) likewise.
        interleaved: whether pairs are neighbours.
        dtype: that cos and sin would have.
    """

    inv_freq: Tensor
    factor: Tensor
    interleaved: bool
    dtype: torch.dtype


Tables = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def fuse(decoder: nn.Module, rope: nn.Module, tables: Tables, inv_freq: Tensor) -> bool | None:
    """Fuse the rotation into the attention of `decoder`, if all of it can be.

    Args:
        decoder: module that hands the rotary's pair to its layers.
        rope: the rotary.
        tables: the host's rotary, from x, position_ids (B, T), inv_freq (B, F) and factor (B,):
            what it returns, and the factor that is on it.
        inv_freq: (F,), any frequencies of the model, on its device.

    Returns:
        Whether its pairs are interleaved; `None` where the host keeps cos and sin.
    """
    rotaries = {id(module) for module in rope.modules()}
    users = [
        module
        for module in decoder.modules()
        if id(module) not in rotaries and opens_pair(type(module))
    ]
    # accelerate's hooks and other wrappers put a forward on the instance that no class can change.
    if any("forward" in vars(user) for user in users):
        return None
    layouts = {_layout(type(user), tables, inv_freq) for user in users}
    if len(layouts) != 1 or None in layouts:
        return None
    for user in users:
        kind: Any = type(user)
        user.__class__ = fused_class(kind)
    return layouts.pop()


def unfuse(module: nn.Module) -> None:
    """Undo `fuse` on one module; does nothing to any other."""
    host = type(module).__dict__.get(_HOST)
    if host is not None:
        module.__class__ = host


def _only_applies(forward: Any) -> bool:
    """Whether cos and sin go into one call of `apply_rotary_pos_emb` and nowhere else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return False
    loads = [
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]
    given = [
        [ast.unparse(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == _APPLY
    ]
    return (
        len(given) == 1
        and given[0][2:4] == ["cos", "sin"]
        and loads.count("cos") == loads.count("sin") == 1
    )


@functools.cache
def fused_class(host: Any) -> Any:
    """The subclass of an attention class that rotates in one operator."""

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new, (host,), module.__dict__

    # One class for all layers, so that the compiler finds one code in all of them.
    parts = {"forward": _rebind(host), "__reduce_ex__": reduce, _HOST: host}
    return type(host.__name__, (host,), {"__module__": host.__module__, **parts})


def _new(host: Any) -> Any:
    """An empty instance; found by name, so that fused models can be pickled."""
    kind = fused_class(host)
    return kind.__new__(kind)


def opens_pair(kind: type[nn.Module]) -> bool:
    """Whether a class of attention takes cos and sin out of what its decoder gives it."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and (_APPLY in code.co_names or {"cos", "sin"} <= {*code.co_varnames})


def _layout(kind: type[nn.Module], tables: Tables, inv_freq: Tensor) -> bool | None:
    """Whether pairs are interleaved; `None` if the fused rotation is not this host's."""
    forward: Any = kind.forward
    apply = getattr(forward, "__globals__", {}).get(_APPLY)
    if apply is None or hasattr(forward, "__wrapped__") or not _only_applies(forward):
        return None
    if list(inspect.signature(apply).parameters) != _PARAMETERS:
        return None
    size, device = 2 * len(inv_freq), inv_freq.device
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 3, size, generator=generator).to(device) for h in (2, 1))
    position_ids = torch.tensor([[0, 1, 1000], [2, 3, 5]], device=device)
    rows = torch.stack([inv_freq, inv_freq / 2])
    factor = torch.tensor([1.0, 1.25], device=device)
    for interleaved in (False, True):
        same = []
        for dtype in (torch.float32, torch.bfloat16):
            pair, whole = tables(q.to(dtype)[:, 0], position_ids, rows, factor)
            if isinstance(pair, Tensor) or any(x.shape != (2, 3, size) for x in pair):
                return None
            theirs = apply(q.to(dtype), k.to(dtype), *pair)
            ours = rotate(q.to(dtype), k.to(dtype), position_ids, rows, whole, interleaved, dtype)
            same += [torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)]
        if all(same):
            return interleaved
    return None


def _rebind(kind: type[nn.Module]) -> FunctionType:
    """The host's forward with `apply_rotary_pos_emb` bound to the fused one."""
    host: Any = kind.forward
    apply = host.__globals__[_APPLY]

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if not isinstance(sin, Angles):
            return apply(q, k, cos, sin, unsqueeze_dim)
        if unsqueeze_dim == 1:
            return rotate(q, k, cos, *sin)
        turned = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, *sin)
        return tuple(x.transpose(1, 2) for x in turned)

    # Without the name of the file: the compiler would read the globals of the file itself.
    names = {name: value for name, value in host.__globals__.items() if name != "__name__"}
    names[_APPLY] = fused
    rebound = FunctionType(host.__code__, names, host.__name__, host.__defaults__, host.__closure__)
    rebound.__kwdefaults__ = host.__kwdefaults__
    return rebound
