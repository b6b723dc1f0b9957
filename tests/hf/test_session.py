"""Open-ended texts: what is in the cache after each kind of growth, against full forward passes."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import clex
import tiny
from clex.errors import ConfigError, DataError
from clex.hf.extend import scale_for
from clex.hf.session import Session

# Cached decoding does the same sums in another order; float32 logits here are of size 1.
DECODING = 1e-4
NATIVE = tiny.NATIVE


def make(family: str = "llama", **settings: Any) -> Any:
    model = clex.extend(
        tiny.make_model(family), clex.ClexConfig(**{"max_scale": 4, "steps": 4, **settings})
    )
    tiny.stir(model)
    return model


def text(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = tiny.make_ids(1, length, seed)[0].tolist()
    return ids


@torch.no_grad()
def next_logits(session: Session) -> Tensor:
    """Logits behind the last token, from a copy of the session's cache."""
    session.prefill()
    assert session.scale is not None
    with clex.at_scale(session.model, session.scale):
        last = torch.tensor([session.ids[-1:]])
        output = session.model(input_ids=last, past_key_values=copy.deepcopy(session.cache))
    logits: Tensor = output.logits[0, -1]
    return logits


def full_logits(session: Session) -> Tensor:
    """The same by one forward pass over the whole text, at the scale of its length."""
    return tiny.logits(session.model, torch.tensor([session.ids]))[0, -1]


def grown(model: Any, on_growth: str, turns: tuple[int, ...] = (40, 50, 70)) -> Session:
    """A session whose text grew by user turns, each prefilled: 40 tokens, 90, 160."""
    session = Session(model, on_growth=on_growth, chunk=32)
    for i, n in enumerate(turns):
        session.append(text(n, seed=i))
        session.prefill()
    return session


def off(session: Session) -> float:
    return (next_logits(session) - full_logits(session)).abs().max().item()


def test_refill_equals_one_forward_pass(family: str) -> None:
    model = make(family)
    session = grown(model, "refill")
    assert session.scale == scale_for(model, 160) > scale_for(model, 90) > 1
    assert [(move.t_to, move.length) for move in session.moves] == [
        (scale_for(model, 90), 90),
        (scale_for(model, 160), 160),
    ]
    assert off(session) < DECODING


@pytest.mark.filterwarnings("ignore:the text has 90 tokens")
def test_rerotate_is_exact_in_the_first_layer_only() -> None:
    model = make()
    exact, moved, held = (grown(model, name) for name in ("refill", "rerotate", "hold"))
    keys = [session.cache.layers[0].keys for session in (exact, moved, held)]
    assert (keys[0] - keys[1]).abs().max() < DECODING
    assert (keys[0] - keys[2]).abs().max() > 0.1
    assert moved.moves == exact.moves
    assert off(moved) > DECODING  # an approximation, and known to be


def test_no_move_inside_a_step_of_the_grid() -> None:
    session = Session(make(), on_growth="refill")
    session.append(text(80))
    session.prefill()
    cache = session.cache
    session.append(text(5))
    session.prefill()
    assert session.cache is cache
    assert not session.moves
    assert off(session) < DECODING


@pytest.mark.parametrize("on_growth", ["refill", "rerotate", "hold"])
def test_answer_that_crosses_borders(on_growth: str) -> None:
    model = make()
    session = Session(model, on_growth=on_growth)
    session.append(text(60))
    streamed: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = session.generate(40, on_token=streamed.append)
    assert answer.finish == "length"
    assert answer.ids == streamed == session.ids[60:]
    assert len(answer.ids) == 40
    held = [str(w.message) for w in caught if "is held at" in str(w.message)]
    if on_growth == "hold":
        assert session.scale == 1
        assert len(held) == 1 and "held at 1, which is for 64" in held[0]
        return
    assert not held
    # 64 tokens are read at t = 1; 65 to 76 and 77 to 90 are the next steps of the grid.
    assert [move.length for move in session.moves] == [65, 77, 91]
    assert session.scale == scale_for(model, 99)
    if on_growth == "refill":
        assert off(session) < DECODING
        assert answer.ids == greedy_by_recomputing(model, session.ids[:60], 40)


def greedy_by_recomputing(model: Any, ids: list[int], new: int) -> list[int]:
    """Greedy tokens, the whole text read anew at the scale of its length for each."""
    ids, start = list(ids), len(ids)
    for _ in range(new):
        ids.append(int(tiny.logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def test_turns_after_an_answer_and_end_tokens() -> None:
    session = Session(make())
    session.append(text(30))
    ids = greedy_by_recomputing(session.model, session.ids, 20)
    end = next(token for i, token in enumerate(ids) if token not in ids[:i] and i > 3)
    answer = session.generate(20, eos_token_id=end)
    assert answer.finish == "stop"
    assert answer.ids == ids[: ids.index(end) + 1]
    assert session.cache.get_seq_length() == len(session.ids) - 1
    session.append(text(10))
    assert off(session) < DECODING


def test_end_token_as_the_last_before_a_border() -> None:
    session = Session(make())
    session.append(text(60))
    ids = greedy_by_recomputing(session.model, session.ids, 5)  # the fifth is behind the border
    if ids[4] in ids[:4]:
        pytest.skip("the token came before")
    assert session.generate(20, eos_token_id=ids[4]).ids == ids


def test_sampling_options_reach_transformers() -> None:
    model = make()

    def sample(seed: int, **options: Any) -> list[int]:
        session = Session(model)
        session.append(text(60))
        torch.manual_seed(seed)
        return session.generate(20, do_sample=True, **options).ids

    assert sample(0) == sample(0) != sample(1)
    greedy = sample(0, top_k=1)
    assert greedy == sample(1, top_k=1)
    session = Session(make())
    session.append(text(60))
    assert session.generate(20, min_new_tokens=10, eos_token_id=greedy[0]).ids[0] != greedy[0]
    for name, value in (("num_beams", 2), ("streamer", None)):
        with pytest.raises(ConfigError, match=f"{name} is not an option"):
            session.generate(5, **{name: value})


def test_the_end_of_the_window() -> None:
    session = Session(make(), on_growth="rerotate")
    assert session.limit == 4 * NATIVE
    session.append(text(250))
    answer = session.generate(50)
    assert (answer.finish, len(session.ids)) == ("window", 256)
    message = r"the text has 257 tokens and the window is 256 \(native 64 x max_scale 4\)"
    with pytest.raises(DataError, match=message):
        session.generate(1)
    with pytest.raises(DataError, match=message):
        session.append([1])
    assert len(session.ids) == 256
    with pytest.raises(DataError, match="300 tokens"):
        session.rewrite(text(300))


def test_given_scale_is_held() -> None:
    model = make()
    session = Session(model, scale=3.0)
    session.append(text(150))
    session.generate(10)
    assert (session.scale, session.moves) == (3.0, [])
    with clex.at_scale(model, 3.0):
        wanted = tiny.logits(model, torch.tensor([session.ids]))[0, -1]
    assert (next_logits(session) - wanted).abs().max() < DECODING
    assert (full_logits(session) - wanted).abs().max() > 0.01
    with pytest.raises(ConfigError, match="scale 5 is out of range"):
        Session(model, scale=5)


def test_continuous_grid_moves_a_quarter_octave_at_a_time() -> None:
    session = Session(make(grid="none"))
    session.append(text(60))
    session.generate(40)
    assert [move.length for move in session.moves] == [65, 77, 91]
    steps = [move.t_to / move.t_from for move in session.moves]
    assert all(math.isclose(step, 2**0.25, rel_tol=0.03) for step in steps)


def test_rewriting_keeps_what_agrees() -> None:
    session = Session(make())
    session.append(text(60))
    session.generate(10)
    ids, cache = session.ids, session.cache
    session.rewrite([*ids[:50], *text(15, seed=9)])
    assert session.cache is cache
    assert cache.get_seq_length() == 50
    read: list[int] = []
    session.prefill(advance=read.append)
    assert sum(read) == 14  # what is new, but for the last token
    with clex.at_scale(session.model, session.scale):  # the scale of the kept part
        wanted = tiny.logits(session.model, torch.tensor([session.ids]))[0, -1]
    assert (next_logits(session) - wanted).abs().max() < DECODING
    session.rewrite(text(20, seed=7))
    assert session.scale is None
    assert off(session) < DECODING
    assert session.scale == 1


def test_rewriting_with_sliding_layers_reads_anew() -> None:
    import transformers

    config = transformers.Gemma3TextConfig(
        **tiny.GROUPED,
        head_dim=16,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
    )
    session = Session(clex.extend(tiny.build(config), clex.ClexConfig(max_scale=4)))
    session.append(text(80))
    session.prefill()
    session.rewrite([*text(80)[:60], *text(15, seed=9)])
    assert off(session) < DECODING


def test_interrupted_answer_can_be_gone_on_with() -> None:
    session = Session(make())
    session.append(text(60))
    streamed: list[int] = []

    def interrupt(token: int) -> None:
        streamed.append(token)
        if len(streamed) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(20, on_token=interrupt)
    assert session.ids[60:] == streamed
    session.append(text(10))
    assert off(session) < DECODING


def test_plain_models_have_their_own_window() -> None:
    model = tiny.make_model()
    session = Session(model)
    session.append(text(60))
    answer = session.generate(20)
    assert (session.scale, session.limit, answer.finish) == (1.0, NATIVE, "window")
    assert answer.ids == greedy_by_recomputing(model, text(60), 4)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="did you mean 'refill'"):
        Session(make(), on_growth="reffil")
    with pytest.raises(ConfigError, match="chunk must be at least 1"):
        Session(make(), chunk=0)
    session = Session(make())
    with pytest.raises(DataError, match="the text is empty"):
        session.generate(5)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        session.generate(0)
