"""Threads: what one does with a model must not reach another, on two models or on one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import clex
import tiny
from clex.hf.extend import require_extension

NEW = 6
# At t = 1 (native length 64), and at 2**(3/4) and 4 with the new tokens.
LENGTHS = (20, 90, 240)


def make(seed: int = 0, max_scale: float = 4) -> Any:
    model = clex.extend(
        tiny.make_model("llama", seed), clex.ClexConfig(max_scale=max_scale, steps=4)
    )
    tiny.stir(model)
    return model


class Together(LogitsProcessor):
    """All threads do each step together: they cannot but be inside `generate` at the same time."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.barrier.wait(timeout=30)
        return scores


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all jobs, each in a thread of its own; an error in one is raised here."""
    results: list[Any] = [None] * len(jobs)

    def work(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def written(model: Any, length: int, barrier: threading.Barrier | None = None) -> list[float]:
    """Scores of generated tokens: they differ where the tokens happen to agree."""
    answer = model.generate(
        tiny.make_ids(1, length),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([Together(barrier)] if barrier else []),
    )
    scores: list[float] = torch.cat(answer.scores)[:, 0].tolist()
    return scores


def test_two_models_generate_at_once() -> None:
    models = [make(0), make(1, max_scale=8)]
    alone = [written(model, 90) for model in models]
    barrier = threading.Barrier(2)
    assert in_threads([lambda m=m: written(m, 90, barrier) for m in models]) == alone


def test_one_model_generates_at_several_scales_at_once() -> None:
    model = make()
    alone = [written(model, length) for length in LENGTHS]
    barrier = threading.Barrier(len(LENGTHS))
    jobs = [lambda n=n: written(model, n, barrier) for n in LENGTHS]
    assert in_threads(jobs) == alone
    assert require_extension(model).scale is None


def test_the_test_sees_shared_state() -> None:
    """With one state for all threads the same test finds other numbers, or the check of caches."""
    model = make()
    alone = [written(model, length) for length in LENGTHS]
    require_extension(model)._own = SimpleNamespace()
    barrier = threading.Barrier(len(LENGTHS))
    try:
        together = in_threads([lambda n=n: written(model, n, barrier) for n in LENGTHS])
    except Exception:
        return
    assert together != alone


def test_forward_passes_at_once() -> None:
    model = make()
    texts = [tiny.make_ids(1, length) for length in LENGTHS]
    alone = [tiny.logits(model, ids) for ids in texts]
    barrier = threading.Barrier(len(LENGTHS))

    # All are between the choice of the scale and the rotary when they meet.
    def meet(*_: Any) -> None:
        barrier.wait(timeout=30)

    model.model.rotary_emb.register_forward_pre_hook(meet)
    together = in_threads([lambda ids=ids: tiny.logits(model, ids) for ids in texts])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_threads_hold_scales_of_their_own() -> None:
    model, ids = make(), tiny.make_ids(1, 50)
    scales = (1.0, 2.0, 4.0)

    def at(t: float, barrier: threading.Barrier) -> Tensor:
        with clex.at_scale(model, t):
            barrier.wait(timeout=30)
            result = tiny.logits(model, ids)
            barrier.wait(timeout=30)
        return result

    alone = [at(t, threading.Barrier(1)) for t in scales]
    barrier = threading.Barrier(len(scales))
    together = in_threads([lambda t=t: at(t, barrier) for t in scales])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert require_extension(model).scale is None


def test_a_worker_inside_the_block_has_its_scale() -> None:
    """How streamers are used: the block in one thread, `generate` in another that it starts."""
    model = make()
    with clex.at_scale(model, 3.0):
        wanted = written(model, 20)
        assert in_threads([lambda: written(model, 20)]) == [wanted]
    assert written(model, 20) != wanted


@pytest.mark.parametrize("kind", ["copy", "pickle"])
def test_a_copy_is_held_by_nobody(kind: str) -> None:
    model, ids = make(), tiny.make_ids(1, 90)
    free = tiny.logits(model, ids)
    with clex.at_scale(model, 4.0):
        other = copy.deepcopy(model) if kind == "copy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(tiny.logits(other, ids), free)
        assert not torch.equal(tiny.logits(model, ids), free)
    assert torch.equal(tiny.logits(model, ids), free)
