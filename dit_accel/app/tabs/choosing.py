"""Who chooses the methods, the budget that they have to keep to, and the quality guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gradio as gr

from dit_accel.app.options import Controls
from dit_accel.app.settings import check_choices, check_number
from dit_accel.app.work import MOST_TRIED, USUALLY_TRIED
from dit_accel.choosing.budget import USUAL_PSNR, Budget
from dit_accel.errors import OptionError
from dit_accel.guard.options import QualityGuard

BY_HAND, SAFE, BUDGET = "hand", "safe", "budget"
WAYS = {BY_HAND: "Method by hand", SAFE: "Automatic (safe)", BUDGET: "Automatic, for a budget"}


class Goal(NamedTuple):
    """A budget in the page: its name, what its number says, at the start, and at most."""

    name: str
    number: str
    start: float
    most: int


GOALS = {
    "min_psnr": Goal("PSNR to dense", "At least, in dB", USUAL_PSNR, 100),
    "max_error": Goal("Error of the latents", "At most, relative", 0.1, 1),
    "target_speedup": Goal("Speed-up", "At least, in times", 1.5, 100),
}
"""Budgets of `accelerate_pipeline`."""
MOST_MINUTES = 24 * 60


@dataclass
class ChoosingControls:
    """Controls of who chooses, for what budget, and of the quality guard.

    Attributes:
        controls: by name.
    """

    controls: Controls = field(default_factory=dict)
    _budget: Any = None

    def draw_way(self) -> None:
        """Draw who chooses, and the budget, of which nothing is shown until it is asked for."""
        self.controls["way"] = gr.Radio(
            [(words, way) for way, words in WAYS.items()],
            value=BY_HAND,
            label="Who chooses",
            info="Automatic (safe) takes a careful published setting. For a budget, methods and "
            "caches are tried on other prompts first: that takes minutes, once.",
        )
        first, goal = next(iter(GOALS.items()))
        with gr.Column(visible=False, min_width=0) as self._budget:
            self.controls["goal"] = gr.Dropdown(
                [(goal.name, option) for option, goal in GOALS.items()],
                value=first,
                label="Budget",
                info="PSNR and error are for nine prompts in ten; the fewer are tried, the more "
                "careful is the guess.",
                filterable=False,
            )
            with gr.Row():
                self.controls["amount"] = gr.Number(
                    goal.start, label=goal.number, min_width=130, elem_id="generate-amount"
                )
                self.controls["tried"] = gr.Number(
                    USUALLY_TRIED,
                    label=f"Prompts to try, up to {MOST_TRIED}",
                    min_width=130,
                    elem_id="generate-tried",
                )
                self.controls["minutes"] = gr.Number(
                    0,
                    label="Minutes to try; 0: no limit",
                    min_width=130,
                    elem_id="generate-minutes",
                )

    def draw_guard(self) -> None:
        """Draw the quality guard's switch and budget."""
        with gr.Group():
            self.controls["guard"] = gr.Checkbox(
                True, label="Quality guard: look at sparse attention, and repair it"
            )
            self.controls["guard_error"] = gr.Slider(
                0.05,
                2,
                QualityGuard.max_error,
                step=0.05,
                label="Error of a head that it lets pass",
            )

    def connect(self, by_hand: list[Any]) -> None:
        """Show the budget, or what is there for choosing ``by_hand``; start budgets sensibly."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        way, goal, amount = (self.controls[name] for name in ("way", "goal", "amount"))

        def show(chosen: str) -> list[Any]:
            hand = [gr.update(visible=chosen == BY_HAND) for _ in by_hand]
            return [gr.update(visible=chosen == BUDGET), *hand]

        def settle(chosen: str) -> Any:
            return gr.update(label=GOALS[chosen].number, value=GOALS[chosen].start)

        way.change(show, way, [self._budget, *by_hand], **quiet)
        goal.change(settle, goal, amount, **quiet)
        self.controls["guard"].change(
            lambda on: gr.update(interactive=on),
            self.controls["guard"],
            self.controls["guard_error"],
            **quiet,
        )


def is_by_hand(given: Mapping[str, Any]) -> bool:
    """Whether the methods are chosen in the page; a tab without the question says nothing.

    Raises:
        OptionError: if there is no such way.
    """
    (way,) = check_choices("way", [given.get("way", BY_HAND)], list(WAYS))
    return way == BY_HAND


def wishes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `accelerate_pipeline` that budget and guard stand for.

    Raises:
        OptionError: if a number is missing or impossible.
    """
    wish = _budget(given) if given.get("way") == BUDGET else {}
    if given.get("guard") is False:
        return {**wish, "guard": False}
    error = check_number("guard error", given.get("guard_error"), 0, 2, whole=False)
    if error in (None, QualityGuard.max_error):
        return wish
    return {**wish, "guard": {"max_error": QualityGuard(max_error=error).max_error}}


def _budget(given: Mapping[str, Any]) -> dict[str, Any]:
    (goal,) = check_choices("budget", [str(given.get("goal"))], list(GOALS))
    amount = check_number(goal, given.get("amount"), 0, GOALS[goal].most, whole=False)
    if amount is None:
        raise OptionError(f"{goal} is empty: write a number, such as {GOALS[goal].start:g}.")
    Budget(**{goal: amount})
    minutes = check_number("minutes to try", given.get("minutes"), 0, MOST_MINUTES, whole=False)
    return {goal: amount, "probe_s": 60 * minutes} if minutes else {goal: amount}
