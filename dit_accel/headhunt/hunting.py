"""A whole search: a model, an objective, prompts, and the file of heads that comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.acceleration import family_of
from dit_accel.environment import environment
from dit_accel.errors import OptionError
from dit_accel.eval.settings import ModelSettings
from dit_accel.generation import GenerationRequest
from dit_accel.guidance.attention import Scope, Target
from dit_accel.guidance.base import DEFAULT_SCALE
from dit_accel.guidance.heads import Head, HeadFile, model_identity
from dit_accel.guidance.softpag import DEFAULT_STRENGTH, SoftPAG
from dit_accel.headhunt.evaluation import HeadEvaluator, ScoreJournal
from dit_accel.headhunt.objectives import Entry, Objective, make_objective
from dit_accel.headhunt.processes import Processes
from dit_accel.headhunt.search import Search, SearchPlan, SearchState, search_heads
from dit_accel.models import generation_defaults


@dataclass(frozen=True, kw_only=True)
class HeadHunt(ModelSettings):
    """What to search, beside the settings of a model.

    Attributes:
        objective: a name (see `make_objective`), or an `Objective`.
        guidance: the pipeline's own; 1, as published, turns classifier-free guidance off.
        prompts: texts; None draws ``count`` from the model's drawn world.
        count: how many to draw, or how many of ``prompts`` to take; None takes all, or draws 20.
        seeds: noises for each prompt.
        first_seed: of the first prompt's first noise; prompts are drawn from it too.
        plan: how to search.
        candidates: heads to choose from; None takes all.
        layers: take those of these layers alone.
        strength, scale, perturbation, scope: of `SoftPAG`.

    Raises:
        OptionError: if a number is impossible, or the objective can't be used on this model.
    """

    objective: str | Objective
    guidance: float | None = 1.0
    batch: int = 16
    prompts: tuple[str, ...] | None = None
    count: int | None = None
    seeds: int = 1
    first_seed: int = 0
    plan: SearchPlan = field(default_factory=SearchPlan)
    candidates: tuple[Head, ...] | None = None
    layers: tuple[int, ...] | None = None
    strength: float = DEFAULT_STRENGTH
    scale: float = DEFAULT_SCALE
    perturbation: Target = "identity"
    scope: Scope = "joint"

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        self.check_counts("batch", "count", "seeds")
        self.request("any", self.first_seed)
        SoftPAG(self.candidates or ((0, 0),), **self.options())
        if self.prompts is not None and not self.prompts:
            raise OptionError("there is no prompt to search with.")

    def options(self) -> dict[str, Any]:
        """Return the options of `SoftPAG`, beside the heads."""
        names = ("strength", "scale", "perturbation", "scope")
        return {name: getattr(self, name) for name in names}

    def make_objective(self) -> Objective:
        """Return the objective; nothing is loaded yet."""
        if isinstance(self.objective, Objective):
            return self.objective
        return make_objective(self.objective, generation_defaults(self.model).world)

    def entries(self, objective: Objective) -> list[Entry]:
        """Return what is to be shown, once per prompt and noise."""
        if self.prompts is None:
            entries = objective.prompts(self.count or 20, self.first_seed)
        elif objective.needs_scenes:
            raise OptionError(
                f"objective '{objective}' has to know what the prompts' scenes hold, and draws "
                "prompts by itself: leave the prompts out."
            )
        else:
            entries = [{"prompt": prompt} for prompt in self.prompts[: self.count]]
        return entries * self.seeds

    def requests(self, entries: list[Entry]) -> list[GenerationRequest]:
        """Return what to generate for these, each from a noise of its own."""
        return [
            self.request(entry["prompt"], self.first_seed + i) for i, entry in enumerate(entries)
        ]

    def find_candidates(self, pipe: Any) -> list[Head]:
        """Return the heads to choose from.

        Raises:
            OptionError: if the model has no such heads or layers.
        """
        identity = model_identity(family_of(pipe), _transformer(pipe))
        layers, heads = identity["layers"], identity["heads"]
        for layer, head in self.candidates or ():
            if layer >= layers or head >= heads:
                raise OptionError(
                    f"head {layer}:{head} is out of range: this model has {layers} layers of "
                    f"{heads} heads, counted from 0."
                )
        for layer in self.layers or ():
            if not 0 <= layer < layers:
                raise OptionError(
                    f"layer {layer} is out of range: this model has {layers}, 0 to {layers - 1}."
                )
        every = [(layer, head) for layer in range(layers) for head in range(heads)]
        taken = every if self.candidates is None else sorted(self.candidates)
        found = [head for head in taken if self.layers is None or head[0] in self.layers]
        self.plan.check(len(found))
        return found


@dataclass(frozen=True)
class Found:
    """What a search found, and for what.

    Attributes:
        hunt: what was searched.
        search: the scores.
        model: see `model_identity`.
        prompts: texts that it was searched with.
        environment: versions and device.
        seconds: of this run alone, where a journal held a part.
    """

    hunt: HeadHunt
    search: Search
    model: dict[str, Any]
    prompts: tuple[str, ...]
    environment: dict[str, Any]
    seconds: float

    def head_file(self) -> HeadFile:
        """Return the heads as `SoftPAG` loads them."""
        hunt, search = self.hunt, self.search
        found = {
            "objective": str(hunt.objective),
            "settings": hunt.described(),
            "plan": asdict(hunt.plan),
            "score": search.best.score,
            "plain_score": search.plain,
            "rounds": [
                {
                    "chosen": one.chosen,
                    "score": one.score,
                    "trials": [[*t.head, t.score, t.gain, t.prompts] for t in one.trials],
                }
                for one in search.rounds
            ],
            "trials": ["layer", "head", "score", "gain", "prompts"],
            "generations": search.generations,
            "seconds": round(self.seconds, 1),
            "prompts": self.prompts,
            "environment": self.environment,
        }
        return HeadFile(
            search.heads,
            self.model,
            hunt.perturbation,
            hunt.scope,
            hunt.strength,
            hunt.scale,
            found,
        )


def hunt_heads(
    pipe: Any,
    hunt: HeadHunt,
    *,
    objective: Objective | None = None,
    journal: Path | None = None,
    processes: Processes | None = None,
    watch: Callable[[SearchState], None] = lambda state: None,
) -> Found:
    """Search a pipeline's attention heads for those that serve an objective; restores the pipeline.

    Args:
        pipe: a pipeline of a known family, loaded as ``hunt`` says.
        hunt: what to search.
        objective: loaded; None makes and loads that of ``hunt``.
        journal: a .jsonl file of all scores, with which an interrupted search goes on. It serves
            any plan and any candidates, but no other settings.
        processes: see `Processes`.
        watch: told of every score.

    Raises:
        OptionError: if the model has no such heads, or the journal is of a search with other
            settings.
        BackboneError: if the objective needs a network that can't be had.
    """
    processes = processes or Processes()
    candidates = hunt.find_candidates(pipe)
    if objective is None:
        objective = hunt.make_objective()
        objective.load(hunt.device)
    entries = hunt.entries(objective)
    began = time.perf_counter()
    model = model_identity(family_of(pipe), _transformer(pipe))
    settings = hunt.described() | hunt.options() | {"transformer": model}
    settings |= {"objective": objective.identity(), "prompts": [e["prompt"] for e in entries]}
    settings |= {"first_seed": hunt.first_seed}
    scorer = HeadEvaluator(
        pipe,
        hunt.requests(entries),
        entries,
        objective,
        hunt.options(),
        batch=hunt.batch,
        scores=ScoreJournal(journal, settings, processes),
        processes=processes,
    )
    search = search_heads(scorer, candidates, len(entries), hunt.plan, watch)
    prompts = tuple(dict.fromkeys(entry["prompt"] for entry in entries))
    about = environment(hunt.device)
    return Found(hunt, search, model, prompts, about, time.perf_counter() - began)


def _transformer(pipe: Any) -> Any:
    found = getattr(pipe, "transformer", None)
    return getattr(found, "_orig_mod", found)
