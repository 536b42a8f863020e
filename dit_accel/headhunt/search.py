"""The greedy search over attention heads (2506.10978, section 4), whatever scores them.

Each round tries every head that is left on top of those chosen so far, and adds the best few. With
successive halving, all heads are tried on a few prompts first, and the better half of them on twice
as many, until few enough are left or all prompts are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import fsum

from dit_accel.errors import OptionError
from dit_accel.guidance.heads import Head

Heads = tuple[Head, ...]


class HeadScorer(ABC):
    """Says how good what comes out is when given heads are guided by."""

    at_once = 1
    """Sets of heads that are best given together."""

    @abstractmethod
    def score(self, sets: Sequence[Heads], prompts: range) -> list[list[float]]:
        """Return a score per set of heads and prompt, more is better; no heads mean no guidance.

        Args:
            sets: heads; their order does not matter.
            prompts: numbers of prompts.
        """


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How to search.

    Args:
        rounds: how often heads are chosen. One finds heads for general quality; style shows from
            the second on.
        per_round: heads added in each; they are tried one by one but added together.
        halving: prompts that all heads are tried on, before half of them are given up and the
            number of prompts doubles; None tries all heads on all prompts.

    Raises:
        OptionError: if a number is below 1.
    """

    rounds: int = 1
    per_round: int = 6
    halving: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("rounds", "per_round", "halving"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} must be at least 1.")

    def rungs(self, candidates: int, prompts: int) -> list[tuple[int, int]]:
        """Return how many heads a round tries, and on how many prompts, rung by rung."""
        tried = min(self.halving or prompts, prompts)
        rungs = [(candidates, tried)]
        while tried < prompts and candidates > self.per_round:
            candidates = max(self.per_round, -(-candidates // 2))
            if candidates == self.per_round:
                break
            tried = min(2 * tried, prompts)
            rungs.append((candidates, tried))
        return rungs

    def generations(self, candidates: int, prompts: int) -> int:
        """Return how many generations a search needs, those without and with all heads included."""
        total = prompts
        for _ in range(self.rounds):
            done = 0
            for tried, seen in self.rungs(candidates, prompts):
                total += tried * (seen - done)
                done = seen
            # All heads together; one head alone has been tried already.
            total += prompts - (done if self.per_round == 1 else 0)
            candidates -= self.per_round
        return total

    def check(self, candidates: int) -> None:
        """Raise `OptionError` if there are fewer heads than are to be chosen."""
        if self.rounds * self.per_round > candidates:
            raise OptionError(
                f"{self.rounds} rounds of {self.per_round} heads are more than the {candidates} "
                "there are to choose from: take fewer."
            )


@dataclass(frozen=True)
class Trial:
    """What a head was worth on top of those chosen before.

    Attributes:
        head: which.
        score: mean over the prompts that it was tried on.
        gain: mean difference to no guidance on the same prompts.
        prompts: how many.
    """

    head: Head
    score: float
    gain: float
    prompts: int


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        chosen: the heads it added, the best first.
        score: mean over all prompts, of all heads chosen so far together.
        trials: all heads tried; those that were tried on more prompts first, then the better ones.
    """

    chosen: Heads
    score: float
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        plain: mean score without guidance.
        rounds: see `Round`.
        generations: how many it took; those read from a journal count too.
    """

    plain: float
    rounds: tuple[Round, ...]
    generations: int

    @property
    def best(self) -> Round:
        """The round whose heads, with those before, scored best; of equals the first."""
        return max(self.rounds, key=lambda one: one.score)

    @property
    def heads(self) -> Heads:
        """The heads chosen up to the best round."""
        before = takewhile(lambda one: one is not self.best, self.rounds)
        return tuple(head for one in (*before, self.best) for head in one.chosen)


@dataclass(frozen=True)
class SearchState:
    """How far a search is.

    Attributes:
        round: from 0.
        done: generations; ``total`` are to be done.
        total: see ``done``.
        plain: mean score without guidance.
        chosen: heads of the rounds before.
        trials: of this round so far, the best first.
    """

    round: int
    done: int
    total: int
    plain: float
    chosen: Heads
    trials: tuple[Trial, ...]


Watch = Callable[[SearchState], None]


def search_heads(
    scorer: HeadScorer,
    candidates: Sequence[Head],
    prompts: int,
    plan: SearchPlan,
    watch: Watch = lambda state: None,
) -> Search:
    """Return the heads that serve an objective best.

    Of heads with equal scores, the first in order of layer and head wins.

    Args:
        scorer: scores sets of heads.
        candidates: heads to choose from.
        prompts: how many prompts there are.
        plan: how to search.
        watch: told of every score.

    Raises:
        OptionError: if there are fewer heads than are to be chosen, or no prompts.
    """
    plan.check(len(candidates))
    if prompts < 1:
        raise OptionError("there is no prompt to search with.")
    hunt = _Hunt(scorer, prompts, plan, watch, plan.generations(len(candidates), prompts))
    hunt.extend([()], prompts)
    left, rounds = sorted(candidates), list[Round]()
    chosen: Heads = ()
    for number in range(plan.rounds):
        ranked = hunt.try_heads(number, chosen, left)
        best = tuple(trial.head for trial in ranked[: plan.per_round])
        chosen, left = chosen + best, [head for head in left if head not in best]
        hunt.extend([chosen], prompts)
        rounds.append(Round(best, hunt.mean(chosen), ranked))
        hunt.tell(number, chosen, ranked)
    return Search(hunt.mean(()), tuple(rounds), hunt.done)


@dataclass
class _Hunt:
    """A search under way; ``scores`` of each set are those of the first prompts."""

    scorer: HeadScorer
    prompts: int
    plan: SearchPlan
    watch: Watch
    total: int
    done: int = 0
    scores: dict[Heads, list[float]] = field(default_factory=dict)

    def try_heads(self, number: int, chosen: Heads, left: Sequence[Head]) -> tuple[Trial, ...]:
        """Return the heads in order of merit."""
        given_up: list[Trial] = []
        rungs = self.plan.rungs(len(left), self.prompts)
        for i, (kept, tried) in enumerate(rungs):
            if i:
                trials = self._ranked(chosen, left)
                given_up = [*trials[kept:], *given_up]
                left = sorted(trial.head for trial in trials[:kept])
            sets = [(*chosen, head) for head in left]
            for start in range(0, len(sets), self.scorer.at_once):
                self.extend(sets[start : start + self.scorer.at_once], tried)
                reached = left[: start + self.scorer.at_once]
                self.tell(number, chosen, self._ranked(chosen, reached))
        return (*self._ranked(chosen, left), *given_up)

    def extend(self, sets: Sequence[Heads], prompts: int) -> None:
        """Score sets on the first so many prompts; what is scored already is kept."""
        by_start: dict[int, list[Heads]] = {}
        for heads in sets:
            by_start.setdefault(len(self.scores.setdefault(heads, [])), []).append(heads)
        for start, some in by_start.items():
            if start < prompts:
                found = self.scorer.score(some, range(start, prompts))
                for heads, scores in zip(some, found, strict=True):
                    self.scores[heads] += scores
                    self.done += len(scores)

    def mean(self, heads: Heads) -> float:
        """Mean score of a set over the prompts that it was tried on."""
        scores = self.scores[heads]
        return fsum(scores) / len(scores)

    def tell(self, number: int, chosen: Heads, trials: tuple[Trial, ...]) -> None:
        """Show how far we are."""
        state = SearchState(number, self.done, self.total, self.mean(()), chosen, trials)
        self.watch(state)

    def _ranked(self, chosen: Heads, left: Sequence[Head]) -> tuple[Trial, ...]:
        trials = []
        for head in left:
            scores = self.scores[(*chosen, head)]
            score, tried = fsum(scores) / len(scores), len(scores)
            plain = fsum(self.scores[()][:tried]) / tried
            trials.append(Trial(head, score, score - plain, tried))
        return tuple(sorted(trials, key=lambda trial: (-trial.score, trial.head)))
