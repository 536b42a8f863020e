"""Generates a suite densely and by every method, measures, and keeps each sample at once.

A run is a folder: ``journal.jsonl`` (a row per sample), ``clips/``, and at the end ``results.json``
and ``report.html``. Batches and their noise follow from the settings alone, so a run that was cut
off anywhere goes on where it stopped, with any number of processes, and ends as it would have.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel.bench.measuring import guarded
from dit_accel.environment import describe_device, environment
from dit_accel.errors import OptionError
from dit_accel.eval.candidates import Candidate
from dit_accel.eval.fidelity import fidelity
from dit_accel.eval.lpips import Lpips, installed_lpips
from dit_accel.eval.measures import CONVENTIONS
from dit_accel.eval.report import write_report
from dit_accel.eval.results import RESULTS_FILE, build_results, write_results
from dit_accel.eval.sampling import PipelineSampler, Sampled, Sampler
from dit_accel.eval.settings import ModelSettings
from dit_accel.eval.share import Share
from dit_accel.eval.suites import Entry, Suite
from dit_accel.files import IMAGE_SUFFIX, VIDEO_SUFFIX, check_outputs, replacing, write_frames
from dit_accel.generation import Progress, makes_video, pipeline_arguments
from dit_accel.journal import Journal, Row, as_read_back, refuse_other
from dit_accel.models import generation_defaults, pipeline_class, pipeline_outline
from dit_accel.world.worlds import make_reader, shares_right

JOURNAL_FILE, REPORT_FILE, CLIPS, REFERENCES = "journal.jsonl", "report.html", "clips", "dense"
TURN = 4
"""Batches that a method makes before the next one's turn: it is attached anew each time, and the
dense baseline's frames of so many batches are kept on disk meanwhile."""


@dataclass(frozen=True, kw_only=True)
class EvalRun(ModelSettings):
    """What to compare, beside the settings of the model.

    Attributes:
        suite: the prompts.
        candidates: the dense baseline first.
        repeats: how often each batch is generated; the first counts, all are timed.

    Raises:
        OptionError: if a number is impossible.
    """

    suite: Suite
    candidates: tuple[Candidate, ...]
    repeats: int = 1

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        self.check_counts("batch", "repeats")
        self.request("any", 0)

    @property
    def batches(self) -> list[tuple[Entry, ...]]:
        """The suite's entries as they are generated together, whatever is there already."""
        entries = self.suite.entries
        return [entries[i : i + self.batch] for i in range(0, len(entries), self.batch)]

    def settings(self) -> Row:
        """Return all that a sample's row depends on, ready for JSON."""
        prompts = json.dumps([(entry.prompt, entry.seed) for entry in self.suite.entries])
        about = describe_device(self.device)
        return self.described() | {
            "suite": self.suite.name,
            "prompts": len({entry.index for entry in self.suite.entries}),
            "samples": len(self.suite.entries),
            "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
            "batch": self.batch,
            "repeats": self.repeats,
            "device_name": about["name"],
            "torch": torch.__version__,
        }

    def methods(self) -> Row:
        """Return method and options of each candidate, ready for JSON."""
        methods: Row = as_read_back(
            {c.label: {"method": c.method, "options": dict(c.options)} for c in self.candidates}
        )
        return methods


def run_evaluation(
    run: EvalRun,
    folder: Path,
    *,
    share: Share | None = None,
    sampler: Sampler | None = None,
    restart: bool = False,
    commit: str | None = None,
    progress: Progress | None = None,
) -> Row | None:
    """Make the samples that ``folder`` lacks, and write ``results.json`` when all have been tried.

    What fails is named in its row and tried again by the next call; the rest goes on.

    Args:
        run: what to compare. Methods may be added to a folder later, other settings may not.
        folder: of the run.
        share: this process's part; None: all of it.
        sampler: generates; None: with the model's pipeline.
        restart: start the folder again.
        commit: to record; asked of git if None.
        progress: told of every sample and step.

    Returns:
        What ``results.json`` holds (see `build_results`), or None if another process returns it.

    Raises:
        OptionError: if the folder can't be used, or was made with other settings, or the pipeline
            can't make that size; before anything is loaded.
        OSError: if the journal or the results can't be written.
    """
    share = share or Share()
    journal = Journal(folder / JOURNAL_FILE)
    if share.first:
        _check_size(run)
        _prepare(run, folder, journal, share, restart, commit)
    share.wait()
    sampler = sampler or PipelineSampler(run, run.repeats, progress)
    _Worker(run, folder, journal, sampler, progress).work(share)
    share.wait()
    if not share.first:
        return None
    shutil.rmtree(folder / REFERENCES, ignore_errors=True)
    for partial in (folder / CLIPS).glob("*/.*"):  # of processes that were killed
        partial.unlink(missing_ok=True)
    labels = [candidate.label for candidate in run.candidates]
    content: Row = as_read_back(
        build_results(journal.rows(), entries=run.suite.entries, labels=labels)
    )
    write_results(content, folder / RESULTS_FILE)
    write_report(content, folder / REPORT_FILE)
    return content


def _check_size(run: EvalRun) -> None:
    outline = pipeline_outline(run.model)
    if outline is not None:
        pipeline_arguments(outline, run.request("any", 0))  # refuses what it can't make


def _prepare(
    run: EvalRun, folder: Path, journal: Journal, share: Share, restart: bool, commit: str | None
) -> None:
    """Make the folder, or see that it holds the beginning of this run; note this session."""
    check_outputs([journal.path, folder / RESULTS_FILE], force=True)
    if restart:
        for name in (JOURNAL_FILE, RESULTS_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in (CLIPS, REFERENCES):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif not journal.path.exists() and folder.is_dir() and any(folder.iterdir()):
        raise OptionError(
            f"output {str(folder)!r} is a folder with other content: name a new one, or --force "
            "to add this run to it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    settings, methods = as_read_back(run.settings()), run.methods()
    for row in journal.rows():
        if row.get("kind") == "session":
            refuse_other(folder, row["settings"], settings, "folder")
            refuse_other(
                folder,
                _named(row["methods"], methods),
                _named(methods, row["methods"]),
                "folder",
            )
    manifest = environment(run.device) | {"processes": share.count, "conventions": CONVENTIONS}
    manifest["commit"] = commit or manifest["commit"]
    journal.append(
        [{"kind": "session", "settings": settings, "methods": methods, "manifest": manifest}]
    )


def _named(methods: Row, labels: Iterable[str]) -> Row:
    """Return the methods that are among ``labels`` under what to call a difference in them."""
    return {f"{label}'s options": methods[label] for label in labels if label in methods}


class _Worker:
    """Makes one process's share of the samples."""

    def __init__(
        self,
        run: EvalRun,
        folder: Path,
        journal: Journal,
        sampler: Sampler,
        progress: Progress | None,
    ) -> None:
        self._run, self._folder, self._journal = run, folder, journal
        self._sampler, self._progress = sampler, progress
        self._kept = {
            (row["method"], row["index"], row["seed"])
            for row in journal.rows()
            if "clip" in row and (folder / row["clip"]).is_file()
        }
        defaults = generation_defaults(run.model)
        self._fps, self._world = defaults.fps, defaults.world
        self._tried = self._total = 0  # samples of this process
        self._suffix = VIDEO_SUFFIX if makes_video(pipeline_class(run.model)) else IMAGE_SUFFIX

    def work(self, share: Share) -> None:
        """Make what is missing of every ``share.count``-th batch."""
        mine = self._run.batches[share.rank :: share.count]
        self._total = sum(map(len, mine)) * len(self._run.candidates)
        self._tried = self._total - sum(
            len(self._missing(candidate, batch))
            for candidate in self._run.candidates
            for batch in mine
        )
        self._tell(0)
        for start in range(0, len(mine), TURN):
            turn = [batch for batch in mine[start : start + TURN] if self._unfinished(batch)]
            for candidate in self._run.candidates:
                for batch in turn:
                    self._make(candidate, batch)
            for batch in turn:
                self._reference(batch).unlink(missing_ok=True)

    def _make(self, candidate: Candidate, batch: Sequence[Entry]) -> None:
        """Make the samples of a batch that are missing, and keep what became of each."""
        missing = self._missing(candidate, batch)
        needed_as_reference = candidate.dense and not self._reference(batch).is_file()
        if not missing and not needed_as_reference:
            return
        made = guarded(lambda _: {"rows": self._rows(candidate, batch)}, {})
        rows = made.pop("rows", [made] * len(batch))
        kept = []
        for entry, row in zip(batch, rows, strict=True):
            if entry in missing:
                about = {"kind": "sample", "method": candidate.label, "index": entry.index}
                about |= {"seed": entry.seed, "prompt": entry.prompt}
                kept.append({**about, **row})
        self._journal.append(kept)
        self._tell(len(kept))

    def _rows(self, candidate: Candidate, batch: Sequence[Entry]) -> list[Row]:
        """Generate a batch, write its clips, and return what was measured of each sample."""
        reference = None if candidate.dense else self._load_reference(batch)
        requests = [self._run.request(entry.prompt, entry.seed) for entry in batch]
        sampled = self._sampler.sample(candidate, requests)
        if candidate.dense:
            self._keep_reference(batch, sampled)
        return [
            self._row(candidate, entry, sampled, place, reference)
            for place, entry in enumerate(batch)
        ]

    def _row(
        self,
        candidate: Candidate,
        entry: Entry,
        sampled: Sampled,
        place: int,
        reference: dict[str, Tensor] | None,
    ) -> Row:
        frames, latents = sampled.batch.frames[place], sampled.batch.latents[place]
        row: Row = {
            "size": [len(frames), *frames.shape[-2:]],
            "frames_sha256": _digest(frames),
            "speed": sampled.speed,
        }
        if sampled.acceleration:
            row["acceleration"] = sampled.acceleration
        pixels = self._ready(frames)
        if reference is not None:
            dense_frames, dense_latents = reference["frames"][place], reference["latents"][place]
            row["dense_sha256"] = _digest(dense_frames)
            row["identical"] = row["dense_sha256"] == row["frames_sha256"]
            row["fidelity"] = fidelity(
                pixels,
                self._ready(dense_frames),
                actual_latents=self._ready(latents),
                dense_latents=self._ready(dense_latents),
                lpips=self._lpips,
            )
        if self._read is not None and entry.scene is not None:
            marks = self._read(pixels, dict(entry.scene))
            row["seen"] = marks.pop("seen")
            row["marks"] = marks
            row["following"] = shares_right([marks])["all"]
        clip = Path(CLIPS) / candidate.label / f"{entry.key}{self._suffix}"
        try:
            write_frames(self._folder / clip, frames.float(), self._fps)
        except OSError as error:
            return {"failed": f"{clip} could not be written: {error}"}
        return {**row, "clip": clip.as_posix()}

    @cached_property
    def _read(self) -> Any:
        return make_reader(self._world, self._run.device) if self._world is not None else None

    @cached_property
    def _lpips(self) -> Lpips | None:
        return installed_lpips(device=self._run.device)

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._run.device, torch.float32)

    def _missing(self, candidate: Candidate, batch: Sequence[Entry]) -> list[Entry]:
        return [e for e in batch if (candidate.label, e.index, e.seed) not in self._kept]

    def _unfinished(self, batch: Sequence[Entry]) -> bool:
        return any(self._missing(candidate, batch) for candidate in self._run.candidates)

    def _reference(self, batch: Sequence[Entry]) -> Path:
        return self._folder / REFERENCES / f"{batch[0].key}.safetensors"

    def _keep_reference(self, batch: Sequence[Entry], sampled: Sampled) -> None:
        frames, latents = sampled.batch.frames, sampled.batch.latents
        with replacing(self._reference(batch)) as partial:
            save_file({"frames": frames.contiguous(), "latents": latents.contiguous()}, partial)

    def _load_reference(self, batch: Sequence[Entry]) -> dict[str, Tensor]:
        path = self._reference(batch)
        if not path.is_file():
            raise OptionError("nothing to compare with: the dense baseline failed here.")
        return load_file(path)

    def _tell(self, made: int) -> None:
        self._tried += made
        if self._progress is not None:
            self._progress("samples", self._tried, self._total)


def _digest(frames: Tensor) -> str:
    return hashlib.sha256(frames.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
