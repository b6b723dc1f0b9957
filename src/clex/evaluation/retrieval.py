"""Retrieval by length and depth: does the model find what is hidden in long text?

Three scores of the same prompt, all from one prefill:

- ``exact``: greedy generation writes the answer.
- ``choice``: the right answer is likelier than every distractor of the same form.
- ``gain``: the right answer is the one that the hidden statement made likelier by most, against
  the same question over text in which nothing is hidden. It takes away what a model thinks of the
  answers by themselves, and shows a signal in small base models first.

The last two have a known chance level, which generation of small models cannot be told from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..errors import ClexError
from ..hf.extend import at_scale, extension_of, scale_for
from .haystacks import Haystacks, Prompt, RetrievalPlan

SCORES = ("exact", "choice", "gain")
# A cell counts as above chance if chance alone gives as much this rarely.
SIGNIFICANCE = 0.05
RETAINED = 0.9


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One question to one model.

    Attributes:
        method: ``base``, ``yarn``, ``clex`` ...
        length: tokens of prompt and answer.
        depth: wanted place of the statement in the haystack, 0 to 1.
        actual_depth: place at the nearest border of sentences.
        needle: number of the needle.
        scale: length scale t that the model used (1 for the plain model).
        statement: what was hidden and asked.
        answer: the right answer.
        generated: what the model wrote; ``None`` if it was not asked to.
        exact: whether that is the answer.
        choice: whether the right answer had the highest log-probability.
        gain: whether the right answer's log-probability rose most.
        log_probs: of the whole answers in nats, the right one first.
        absent_log_probs: the same with nothing hidden in the text.
        answer_tokens: tokens of each answer.
    """

    method: str
    length: int
    depth: float
    actual_depth: float
    needle: int
    scale: float
    statement: str
    answer: str
    generated: str | None
    exact: bool | None
    choice: bool
    gain: bool
    log_probs: tuple[float, ...]
    absent_log_probs: tuple[float, ...]
    answer_tokens: int

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What tells this trial from all others of a run."""
        return self.method, self.length, self.depth, self.needle

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Trial:
        """The reverse of `to_dict`."""
        values: dict[str, Any] = dict(record)
        for name in ("log_probs", "absent_log_probs"):
            values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All trials of one method at one length and depth.

    Attributes:
        method: as in `Trial`.
        length: tokens.
        depth: 0 to 1.
        trials: their number.
        exact: share of right generations; ``None`` if nothing was generated.
        choice: share of right choices by log-probability.
        gain: share of right choices by gain in log-probability.
        log_prob: mean log-probability of the right answer, nats a token.
        log_prob_gain: how much of it the hidden statement brought, nats a token.
    """

    method: str
    length: int
    depth: float
    trials: int
    exact: float | None
    choice: float
    gain: float
    log_prob: float
    log_prob_gain: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One score of one method at one length, over all depths.

    Attributes:
        method: as in `Trial`.
        score: one of `SCORES`.
        length: tokens.
        trials: their number.
        mean: share of right answers.
        low, high: 95 % interval of the mean (Wilson). Trials of one needle are not independent: an
            answer that a model likes by itself is right at every depth. So each needle counts once.
        above_chance: whether that interval is above chance.
        depths_above_chance: share of depths that are, each by itself (binomial test, one-sided).
    """

    method: str
    score: str
    length: int
    trials: int
    mean: float
    low: float
    high: float
    above_chance: bool
    depths_above_chance: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def run_retrieval(
    model: nn.Module,
    haystacks: Haystacks,
    plan: RetrievalPlan,
    method: str,
    done: Iterable[Trial] = (),
    keep: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Ask one model all questions of a plan.

    An extended model reads every prompt of a length, and writes its answer, at the scale of that
    length.

    Args:
        model: a plain or an extended model.
        haystacks: the prompts.
        plan: what is asked.
        method: name for the trials.
        done: trials of an earlier run, which are not asked again.
        keep: called with each new trial as soon as it is there.

    Returns:
        All trials in the order of the plan, those of `done` among them.

    Raises:
        ClexError: a log-probability is not a number.
    """
    training, extended = model.training, extension_of(model) is not None
    model.eval()
    known = {trial.key: trial for trial in done}
    trials = []
    try:
        for length, number in ((n, k) for n in plan.lengths for k in range(plan.needles)):
            scale = scale_for(model, length) if extended else 1.0
            absent: tuple[float, ...] | None = None
            with at_scale(model, scale) if extended else nullcontext():
                for depth in plan.depths:
                    old = known.get((method, length, depth, number))
                    if old is not None:
                        absent = old.absent_log_probs
                        trials.append(old)
                        continue
                    if absent is None:
                        # One for all depths: where nothing is hidden there is no depth.
                        prompt = haystacks.prompt(length, 0.0, number, hide=False)
                        absent = ask(model, prompt).log_probs
                    prompt = haystacks.prompt(length, depth, number)
                    tokenizer = haystacks.tokenizer if plan.generate else None
                    trial = _trial(prompt, ask(model, prompt, tokenizer), absent, method, scale)
                    keep(trial)
                    trials.append(trial)
    finally:
        model.train(training)
    return trials


@dataclass(frozen=True)
class Reply:
    """What a model said to one prompt.

    Attributes:
        log_probs: of each candidate, nats, summed over its tokens.
        generated: greedy text of as many tokens as the answer has; ``None`` if not wanted.
    """

    log_probs: tuple[float, ...]
    generated: str | None


@torch.no_grad()
def ask(model: nn.Module, prompt: Prompt, tokenizer: Any = None) -> Reply:
    """Score all candidates of a prompt, and generate if a tokenizer is given, from one prefill.

    Candidates go one after another over the one cache, which is cut back after each: a copy of a
    cache of 64k tokens for each of them would not fit beside many models. The output head sees
    the tokens of answers alone.

    Raises:
        ClexError: a log-probability is not a number.
    """
    runner: Any = model
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.input_ids], device=device)
    # The last token is left out: each candidate brings it, so that its own first token is scored.
    cache = runner(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    size = ids.shape[1] - 1
    generated = None
    if tokenizer is not None:
        # Sampling settings of the checkpoint would only raise warnings here.
        greedy = GenerationConfig(
            max_new_tokens=len(prompt.candidates[0]),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        branch = _branch(cache)
        output = runner.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=branch,
            generation_config=greedy,
        )
        generated = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        _cut_back(branch, cache, size)
    scores = []
    for candidate in prompt.candidates:
        answer = torch.tensor([candidate], device=device)
        branch = _branch(cache)
        output = runner(
            input_ids=torch.cat([ids[:, -1:], answer[:, :-1]], dim=1),
            past_key_values=branch,
            use_cache=True,
        )
        _cut_back(branch, cache, size)
        log_probs: Tensor = output.logits.float().log_softmax(-1)
        scores.append(log_probs.gather(-1, answer[..., None]).double().sum())
    values = tuple(torch.stack(scores).tolist())
    if not all(math.isfinite(value) for value in values):
        raise ClexError(f"the log-probabilities at {prompt.length} tokens are not numbers")
    return Reply(values, generated)


def _branch(cache: Any) -> Any:
    """A cache to go on with: the same one, or a copy where tokens cannot be taken out again."""
    return copy.deepcopy(cache) if any(getattr(cache, "is_sliding", ())) else cache


def _cut_back(branch: Any, cache: Any, size: int) -> None:
    if branch is cache:
        # Negative: the number of tokens that go.
        cache.crop(size - cache.get_seq_length())


def _trial(
    prompt: Prompt, reply: Reply, absent: tuple[float, ...], method: str, scale: float
) -> Trial:
    rise = [now - before for now, before in zip(reply.log_probs, absent, strict=True)]
    return Trial(
        method=method,
        length=prompt.length,
        depth=prompt.depth,
        actual_depth=prompt.actual_depth,
        needle=prompt.needle,
        scale=scale,
        statement=prompt.statement,
        answer=prompt.answer,
        generated=reply.generated,
        exact=None if reply.generated is None else reply.generated.strip() == prompt.answer,
        choice=_first_wins(reply.log_probs),
        gain=_first_wins(rise),
        log_probs=reply.log_probs,
        absent_log_probs=absent,
        answer_tokens=len(prompt.candidates[0]),
    )


def _first_wins(values: Sequence[float]) -> bool:
    # A tie is no answer: a model that gives all candidates the same must not be right.
    return all(values[0] > value for value in values[1:])


def cells_of(trials: Sequence[Trial]) -> list[Cell]:
    """Means of the trials of each method, length and depth, in order of appearance."""
    groups: dict[tuple[str, int, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.method, trial.length, trial.depth), []).append(trial)
    return [
        Cell(
            method=method,
            length=length,
            depth=depth,
            trials=len(group),
            exact=None if group[0].exact is None else _mean(bool(t.exact) for t in group),
            choice=_mean(t.choice for t in group),
            gain=_mean(t.gain for t in group),
            log_prob=_mean(t.log_probs[0] / t.answer_tokens for t in group),
            log_prob_gain=_mean(
                (t.log_probs[0] - t.absent_log_probs[0]) / t.answer_tokens for t in group
            ),
        )
        for (method, length, depth), group in groups.items()
    ]


def summarise(trials: Sequence[Trial], plan: RetrievalPlan) -> list[Summary]:
    """Every score of every method at every length."""
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.method, trial.length), []).append(trial)
    return [
        _summary(group, score, 0.0 if score == "exact" else plan.chance)
        for score in SCORES
        for group in groups.values()
        if group[0].exact is not None or score != "exact"
    ]


def _summary(trials: Sequence[Trial], score: str, chance: float) -> Summary:
    hits = sum(getattr(trial, score) for trial in trials)
    mean, needles = hits / len(trials), len({trial.needle for trial in trials})
    low, high = wilson(mean * needles, needles)
    by_depth: dict[float, list[bool]] = {}
    for trial in trials:
        by_depth.setdefault(trial.depth, []).append(getattr(trial, score))
    return Summary(
        method=trials[0].method,
        score=score,
        length=trials[0].length,
        trials=len(trials),
        mean=mean,
        low=low,
        high=high,
        above_chance=low > chance,
        depths_above_chance=_mean(
            tail(sum(row), len(row), chance) < SIGNIFICANCE for row in by_depth.values()
        ),
    )


def effective_length(rows: Sequence[Summary], native_length: int) -> int | None:
    """The last length up to which one score of one method stays at 0.9 of its native value.

    Args:
        rows: of one method and one score.
        native_length: the longest length measured up to here is the native one.

    Returns:
        Tokens; ``None`` if no length within the native window was measured, or the model does
        not find anything there either.
    """
    ordered = sorted(rows, key=lambda row: row.length)
    inside = [row for row in ordered if row.length <= native_length]
    if not inside or not inside[-1].above_chance:
        return None
    last = inside[-1]
    for row in ordered[len(inside) :]:
        if row.mean < RETAINED * inside[-1].mean - 1e-9:  # shares that are equal are enough
            break
        last = row
    return last.length


def tail(hits: int, trials: int, chance: float) -> float:
    """Chance of at least so many hits by luck (binomial, one-sided)."""
    return sum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        for k in range(hits, trials + 1)
    )


def wilson(hits: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); unlike the normal one it holds at 0 and 1."""
    share = hits / trials
    centre = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
