"""Scores heads by generating with them, and keeps every score in a journal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from dit_accel.acceleration import accelerate_pipeline, restore_pipeline
from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, generate_batch
from dit_accel.guidance.softpag import SoftPAG
from dit_accel.headhunt.objectives import Entry, Objective
from dit_accel.headhunt.processes import Processes
from dit_accel.headhunt.search import Heads, HeadScorer
from dit_accel.journal import Journal, as_read_back, refuse_other
from dit_accel.kinds import Method

KIND = "headhunt"
_START = f'{{"kind": "{KIND}"'.encode()


class HeadEvaluator(HeadScorer):
    """Scores heads by the mean of an objective over generations.

    The same prompts start from the same noise whatever the heads.

    Args:
        pipe: a pipeline of a known family.
        requests: what to generate; they differ in prompt and seed alone.
        entries: what each is to show, for the objective.
        objective: loaded.
        options: of `SoftPAG`, beside ``heads``.
        batch: generations at once.
        scores: where scores are kept.
        processes: share the generations.
    """

    def __init__(
        self,
        pipe: Any,
        requests: Sequence[GenerationRequest],
        entries: Sequence[Entry],
        objective: Objective,
        options: Mapping[str, Any],
        *,
        batch: int,
        scores: ScoreJournal,
        processes: Processes,
    ) -> None:
        self.pipe, self.requests, self.entries = pipe, requests, entries
        self.objective, self.options, self.batch = objective, options, batch
        self.scores, self.processes = scores, processes
        self.at_once = processes.count

    def score(self, sets: Sequence[Heads], prompts: range) -> list[list[float]]:
        """See `HeadScorer.score`."""
        missing = [
            (heads, prompt)
            for heads in sets
            for prompt in prompts
            if prompt not in self.scores.known(heads)
        ]
        found = []
        for heads, group in groupby(self.processes.share(missing), key=lambda item: item[0]):
            numbers = [prompt for _, prompt in group]
            scores = self._generate(heads, numbers)
            self.scores.write(heads, numbers, scores)
            found.append((heads, numbers, scores))
        for heads, numbers, scores in self.processes.gather(found):
            self.scores.keep(heads, numbers, scores)
        return [[self.scores.known(heads)[prompt] for prompt in prompts] for heads in sets]

    def _generate(self, heads: Heads, prompts: Sequence[int]) -> list[float]:
        restore_pipeline(self.pipe)
        if heads:
            guidance = SoftPAG(heads, **self.options)
            accelerate_pipeline(self.pipe, _methods(guidance))
        found: list[float] = []
        try:
            for start in range(0, len(prompts), self.batch):
                some = prompts[start : start + self.batch]
                with torch.no_grad():
                    batch = generate_batch(self.pipe, [self.requests[i] for i in some])
                found += self.objective.score(batch.frames.float(), [self.entries[i] for i in some])
        finally:
            restore_pipeline(self.pipe)
        if not all(map(math.isfinite, found)):
            raise OptionError(
                f"objective '{self.objective}' gave a score that is not finite for the heads "
                f"{list(heads)}: take a smaller scale, or dtype float32."
            )
        return found


def _methods(guidance: SoftPAG) -> list[str | Method]:
    """Return the guidance with an attention method where it needs one."""
    return ["dense", guidance] if guidance.sees_queries else [guidance]


class ScoreJournal:
    """Scores by heads and prompt, kept in a file that a later search of the same kind goes on with.

    Args:
        path: a .jsonl file; None keeps them in memory.
        settings: all that the scores depend on, ready for JSON.
        processes: all of them write into the file.

    Raises:
        OptionError: if the file is of a search with other settings, or no journal.
    """

    def __init__(
        self, path: Path | None, settings: Mapping[str, Any], processes: Processes
    ) -> None:
        self.journal = None if path is None else Journal(path)
        self._scores: dict[Heads, dict[int, float]] = {}
        if self.journal is None:
            return
        rows = self.journal.rows()
        if self.journal.path.exists():
            _check_header(self.journal.path, rows, settings)
        processes.wait()  # until all have seen whether it was there
        if not rows and processes.is_main:
            self.journal.path.parent.mkdir(parents=True, exist_ok=True)
            self.journal.append([{"kind": KIND, "settings": as_read_back(settings)}])
        for row in rows[1:]:
            self.keep(tuple(map(tuple, row["heads"])), row["prompts"], row["scores"])
        processes.wait()

    def known(self, heads: Heads) -> dict[int, float]:
        """Return the scores of a set by prompt."""
        return self._scores.setdefault(tuple(sorted(heads)), {})

    def keep(self, heads: Heads, prompts: Sequence[int], scores: Sequence[float]) -> None:
        """Keep scores in memory."""
        self.known(heads).update(zip(prompts, scores, strict=True))

    def write(self, heads: Heads, prompts: Sequence[int], scores: Sequence[float]) -> None:
        """Write scores into the file."""
        if self.journal is not None:
            row = {"heads": sorted(heads), "prompts": list(prompts), "scores": list(scores)}
            self.journal.append([row])


def _check_header(path: Path, rows: Sequence[Mapping[str, Any]], settings: Any) -> None:
    begun = path.read_bytes()[: len(_START)]
    if not rows and _START.startswith(begun):
        return  # cut off while the header was written
    header = rows[0] if rows else {}
    if header.get("kind") != KIND or not isinstance(header.get("settings"), dict):
        raise OptionError(
            f"journal {str(path)!r} is no journal of `headhunt`: give another name, or --force to "
            "replace it."
        )
    refuse_other(path, header["settings"], as_read_back(settings))
