"""HeadHunter (2506.10978): finds attention heads whose perturbation serves an objective.

`search` is the search itself, over anything that scores sets of heads; `evaluation` scores them by
generating; `objectives` says what is a good picture; `hunting` puts these together.
"""

from dit_accel.headhunt.hunting import Found, HeadHunt, hunt_heads
from dit_accel.headhunt.objectives import Entry, Objective, make_objective
from dit_accel.headhunt.search import SearchPlan, SearchState

__all__ = [
    "Entry",
    "Found",
    "HeadHunt",
    "Objective",
    "SearchPlan",
    "SearchState",
    "hunt_heads",
    "make_objective",
]
