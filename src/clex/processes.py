"""A run of several processes: how they are cut, what they agree on, how the loss of one shows.

`torchrun` and `accelerate launch` say in the environment who is who; one process needs neither.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import ConfigError, TrainingError

ResultT = TypeVar("ResultT")


def world_size() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    return int(os.environ.get("RANK", "0")) == 0


def pieces() -> int:
    """Processes that each text is cut across (context parallelism of accelerate).

    Raises:
        ConfigError: the launcher asks for a way of cutting that training here does not know.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false") != "true":
        return 1
    for name, what in (("TP", "tensor"), ("SP", "DeepSpeed's sequence")):
        size = os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
        if size != "1":
            raise ConfigError(
                f"{what} parallelism ({size} processes) is not supported; context parallelism is:"
                " parallelism_config_cp_size"
            )
    return int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1"))


def readers() -> int:
    """Processes, or groups of `pieces`, that each read windows of their own."""
    return world_size() // pieces()


def join() -> None:
    """Take this process's GPU and meet the other processes; nothing to do for a single one.

    Raises:
        ConfigError: accelerate does not cut weights or texts on CPUs, though it was asked to.
    """
    if world_size() > 1:
        # Before they meet: a process that leaves while others connect shows them a network error.
        _refuse_cutting_on_cpus()
        # transformers would read the weights in one process and leave the others' empty.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        PartialState(cpu=not torch.cuda.is_available())
        _patient_group()


def _refuse_cutting_on_cpus() -> None:
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if (sharded or pieces() > 1) and not torch.cuda.is_available():
        what = "context parallelism" if pieces() > 1 else "FSDP2"
        raise ConfigError(f"{what} needs GPUs; on CPUs start this run with torchrun, for DDP")


def agreed(work: Callable[[], ResultT]) -> ResultT:
    """What `work` returns in the main process, in all processes; only there is it called.

    The others wait as long as it takes. An error in the main process ends the run.
    """
    if world_size() == 1:
        return work()
    box = [work() if is_main() else None]
    dist.broadcast_object_list(box, src=0, group=_patient_group())
    result: Any = box[0]
    return result


@cache
def _patient_group() -> Any:
    # NCCL gives up after minutes, and an evaluation in the main process takes longer.
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def cut_up(model: nn.Module) -> bool:
    """Whether an engine holds a part of each weight here (FSDP2, ZeRO-3)."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients of small `parameters` over all processes, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, together.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def same_everywhere(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the main one's values of small `parameters`."""
    for parameter in parameters:
        dist.broadcast(parameter, src=0)


@contextmanager
def others_alive(advice: Callable[[], str]) -> Iterator[None]:
    """Say in one line that another process ended, instead of what the network layer saw of it.

    Args:
        advice: called for the end of the line.

    Raises:
        TrainingError: a collective failed since another process is gone, or the launcher, which
            saw it first, ends this one.
    """

    def told(number: int, frame: Any) -> None:
        raise TrainingError(f"the launcher ended this process; {advice()}")

    mine = world_size() > 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, told) if mine else None
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        network = isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
        if world_size() > 1 and network and "out of memory" not in text:
            raise TrainingError(f"another process of this run ended; {advice()}") from error
        raise
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)
