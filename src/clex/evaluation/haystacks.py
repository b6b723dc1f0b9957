"""Prompts that hide statements in long text and ask for one of them.

Lengths are counted in tokens and hold to the token: special tokens, question and answer are in
them. Everything is a pure function of the plan's seed, the number of the needle, the length and the
depth, so that a run resumes exactly and all methods read the same prompts.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from ..errors import ConfigError, DataError, unknown

TASKS = ("passkey", "needle")
DEPTHS = tuple(i / 10 for i in range(11))

_FILLER = (
    "The road goes on.",
    "The river runs beside it.",
    "The hills are green.",
    "Clouds pass over them.",
    "Then the road turns again.",
)
_THINGS = ("magic number", "locker code", "ticket number", "house number", "telephone number")
_PLACES = (
    *("Lisbon", "Cairo", "Oslo", "Vienna", "Lima", "Prague", "Dublin", "Madrid", "Warsaw"),
    *("Geneva", "Athens", "Berlin", "Delhi", "Quebec", "Havana", "Tunis", "Boston", "Naples"),
    *("Glasgow", "Zurich", "Malta", "Bergen", "Seville", "Hamburg"),
)
_DIGITS = 5
# Longer pieces of badly punctuated text are divided between words.
_WORDS_OF_PIECE = 40
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'\u2019\u201d)]))\s+")
_FEWEST_HAYSTACK_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class RetrievalPlan:
    """What is hidden where.

    Args:
        task: ``passkey`` (repeated filler) or ``needle`` (real text).
        lengths: tokens of prompt and answer together, ascending.
        depths: places of the asked statement as shares of the haystack, 0 its start, 1 its end.
        needles: different statements, in different text, tried in every cell.
        hidden: statements hidden at once, of which one is asked; the others lie spread evenly.
        distractors: wrong answers that the right one competes with; chance is
            ``1 / (distractors + 1)``.
        seed: of text, statements and answers.
        generate: also score greedy generation by exact match.

    Raises:
        ConfigError: a value is out of range.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = DEPTHS
    needles: int = 5
    hidden: int = 1
    distractors: int = 9
    seed: int = 0
    generate: bool = True

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(unknown("retrieval task", self.task, TASKS))
        for name, most in (("needles", 10_000), ("hidden", len(_PLACES)), ("distractors", 1000)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ConfigError(f"{name} must be from 1 to {most}, not {value}")
        if self.task == "passkey" and self.hidden > 1:
            raise ConfigError(f"passkey hides 1 statement, not {self.hidden}; use needle")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ConfigError(f"lengths must ascend, got {self.lengths}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths must be from 0 to 1, got {self.depths}")

    @property
    def chance(self) -> float:
        """Share of right choices of a model that knows nothing."""
        return 1 / (self.distractors + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question.

    Attributes:
        input_ids: the prompt; with one candidate behind it, exactly `length` tokens.
        candidates: token ids of the answers, all of one length; the right one is the first.
        length: tokens of the cell.
        depth: wanted place of the asked statement.
        actual_depth: share of the haystack's tokens before it: the nearest border of sentences.
        position: index of its first token in `input_ids`; ``None`` if nothing was hidden.
        needle: number of the needle.
        statement: the asked statement.
        answer: the right answer.
    """

    input_ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    length: int
    depth: float
    actual_depth: float
    position: int | None
    needle: int
    statement: str
    answer: str


@dataclass(frozen=True)
class _Needle:
    statements: tuple[str, ...]
    question: str
    answers: tuple[str, ...]  # right one, those of the other statements, distractors
    pieces: tuple[tuple[int, ...], ...]  # the haystack: token ids of one sentence after another


class Haystacks:
    """Makes the prompts of a plan for one tokenizer.

    Args:
        tokenizer: of the model.
        plan: what is hidden where.
        documents: texts for task ``needle``; not read for ``passkey``.

    Raises:
        DataError: the documents together are shorter than the longest length.
        ConfigError: the shortest length has no room for a haystack.
    """

    def __init__(self, tokenizer: Any, plan: RetrievalPlan, documents: Sequence[str] = ()) -> None:
        self.tokenizer, self.plan = tokenizer, plan
        self._anchor = self._plain("x")
        whole = tokenizer("x", verbose=False)["input_ids"]
        # What the tokenizer puts in front of a text, and not what it puts behind.
        self._specials = whole[: len(whole) - len(self._anchor)] if len(whole) > 1 else []
        if whole[len(self._specials) : len(self._specials) + len(self._anchor)] != self._anchor:
            self._specials = [i for i in whole[:1] if i in tokenizer.all_special_ids]
        source = [" ".join(_FILLER)] if plan.task == "passkey" else list(documents)
        self._documents = [sentences(text) for text in source]
        self._encoded: dict[tuple[int, int], tuple[int, ...]] = {}
        self._needles: dict[int, _Needle] = {}
        room = plan.lengths[0] - self._overhead(self.needle(0), True)
        if room < _FEWEST_HAYSTACK_TOKENS:
            shortest = plan.lengths[0] - room + _FEWEST_HAYSTACK_TOKENS
            raise ConfigError(
                f"{plan.lengths[0]} tokens do not hold the question and a haystack;"
                f" the shortest length is {shortest}"
            )

    def needle(self, number: int) -> _Needle:
        """Statements, question, answers and text of one needle; the same for all its prompts."""
        if number not in self._needles:
            self._needles[number] = self._make(number)
        return self._needles[number]

    def prompt(self, length: int, depth: float, number: int, *, hide: bool = True) -> Prompt:
        """One question.

        Args:
            length: tokens of prompt and answer.
            depth: where the asked statement goes, 0 to 1.
            number: of the needle.
            hide: whether the statements are in the text; without them more of the text is.
        """
        needle = self.needle(number)
        candidates = tuple(tuple(self.encode(f" {answer}")) for answer in needle.answers)
        size = length - self._overhead(needle, hide)
        haystack, borders = _last_tokens(needle.pieces, size)
        parts = []
        if hide:
            count = len(needle.statements)
            for index, statement in enumerate(needle.statements):
                place = depth if index == 0 else (depth + index / count) % 1.0
                border = min(borders, key=lambda at, place=place: abs(at - place * size))  # type: ignore[misc]
                parts.append((border, index, self.encode(f" {statement}")))
        ids = [*self._specials, *self.encode(_intro(self.plan), first=True)]
        position, actual, last = None, depth, 0
        for border, index, tokens in sorted(parts):
            ids += haystack[last:border]
            if index == 0:
                position, actual = len(ids), border / size
            ids += tokens
            last = border
        ids += [*haystack[last:], *self.encode(needle.question)]
        assert len(ids) + len(candidates[0]) == length
        return Prompt(
            input_ids=tuple(ids),
            candidates=candidates,
            length=length,
            depth=depth,
            actual_depth=actual,
            position=position,
            needle=number,
            statement=needle.statements[0],
            answer=needle.answers[0],
        )

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """Token ids of `text` as it continues another one (or begins, with `first`)."""
        if first:
            return self._plain(text)
        # Some tokenizers put a space before whatever they are given.
        ids = self._plain(f"x{text}")
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else ids[1:]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _overhead(self, needle: _Needle, hide: bool) -> int:
        """Tokens of a prompt and its answer that are not haystack."""
        shown = sum(len(self.encode(f" {s}")) for s in needle.statements) if hide else 0
        return (
            len(self._specials)
            + len(self.encode(_intro(self.plan), first=True))
            + shown
            + len(self.encode(needle.question))
            + len(self.encode(f" {needle.answers[0]}"))
        )

    def _make(self, number: int) -> _Needle:
        plan = self.plan
        random = Random(f"{plan.task} {plan.seed} {number}")
        pieces, text = self._text(random)
        answers: list[str] = []
        form = None
        for _ in range(100_000):
            answer = str(random.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
            size = len(self.encode(f" {answer}"))
            form = form or size
            if size == form and answer not in answers and answer not in text:
                answers.append(answer)
            if len(answers) >= plan.hidden + plan.distractors:
                break
        else:
            raise DataError("the text holds too many numbers to hide another; give other text")
        if plan.task == "passkey":
            statements = [f"The pass key is {answers[0]}. Remember it: the key is {answers[0]}."]
            question = "\n\nThe pass key is"
        else:
            thing = _THINGS[number % len(_THINGS)]
            places = random.sample(_PLACES, plan.hidden)
            statements = [
                f"The {thing} of {place} is {answer}."
                for place, answer in zip(places, answers, strict=False)
            ]
            question = f"\n\nThe {thing} of {places[0]} is"
            # Answers of the other statements are the hardest distractors: as many as there is room.
            others = answers[1 : plan.hidden][: plan.distractors]
            spare = answers[plan.hidden :][: plan.distractors - len(others)]
            answers = [answers[0], *others, *spare]
        return _Needle(tuple(statements), question, tuple(answers), tuple(pieces))

    def _text(self, random: Random) -> tuple[list[tuple[int, ...]], str]:
        """Sentences from a random place on, through document after document, for all lengths."""
        places = [
            (d, s) for d, document in enumerate(self._documents) for s in range(len(document))
        ]
        if not places:
            raise DataError("no text to hide a needle in")
        longest = self.plan.lengths[-1]
        start = random.randrange(len(places))
        order: Iterator[tuple[int, int]] = iter(places[start:] + places[:start])
        if self.plan.task == "passkey":
            order = itertools.cycle(places)
        pieces, chosen, total = [], [], 0
        for document, sentence in order:
            if (document, sentence) not in self._encoded:
                text = self._documents[document][sentence]
                self._encoded[document, sentence] = tuple(self.encode(f" {text}"))
            pieces.append(self._encoded[document, sentence])
            chosen.append(self._documents[document][sentence])
            total += len(pieces[-1])
            if total >= longest:
                return pieces, " ".join(chosen)
        raise DataError(
            f"the text has {total:,} tokens, fewer than the longest length {longest:,};"
            " give more text or shorter lengths"
        )


def sentences(text: str) -> list[str]:
    """Sentences of running text, white space made one; overlong ones are cut between words."""
    result = []
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        words = sentence.split(" ")
        for i in range(0, len(words), _WORDS_OF_PIECE):
            if piece := " ".join(words[i : i + _WORDS_OF_PIECE]).strip():
                result.append(piece)
    return result


def _intro(plan: RetrievalPlan) -> str:
    what = "A pass key is" if plan.task == "passkey" else "A fact is"
    return f"{what} hidden in this text. Find it and remember it."


def _last_tokens(pieces: Sequence[tuple[int, ...]], size: int) -> tuple[list[int], list[int]]:
    """`size` tokens that end where a sentence ends, and the borders of sentences within.

    The first sentence may be cut, as an excerpt is.
    """
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    count = bisect_right(ends, size - 1) + 1
    tokens = [token for piece in pieces[:count] for token in piece]
    surplus = len(tokens) - size
    borders = [0] + [end - surplus for end in ends[:count] if end > surplus]
    return tokens[surplus:], borders
