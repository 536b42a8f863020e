"""A scheduler that starts from a stated noise level."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

from dit_accel.errors import OptionError


def check_scheduler(scheduler: Any, flow_shift: float | None) -> None:
    """Raise `OptionError` unless a scheduler can start from a stated level, with that shift."""
    name, config = type(scheduler).__name__, scheduler.config
    flow = "FlowMatch" in name or config.get("use_flow_sigmas", False)
    if not flow or getattr(scheduler, "order", 1) != 1:
        raise OptionError(
            f"freeswim mixes latents and noise by flow matching, one step at a time, and {name} "
            "works otherwise: use FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler "
            "with use_flow_sigmas=True."
        )
    if flow_shift is not None and config.get("use_dynamic_shifting", False):
        raise OptionError(
            f"flow_shift={flow_shift} has no effect on {name} with use_dynamic_shifting, which "
            "shifts by the image's size: leave it out."
        )


def starting_at(scheduler: Any, sigma: float, flow_shift: float | None) -> Any:
    """Return a copy of a scheduler whose schedules begin at the noise level ``sigma``.

    They are those of the number of steps asked for, without the steps before: the one nearest to
    ``sigma`` is moved there and becomes the first.
    """
    if flow_shift is None:
        made = copy.deepcopy(scheduler)
    else:
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        made = type(scheduler).from_config(scheduler.config, **{name: flow_shift})
    stock = made.set_timesteps

    @wraps(stock)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        stock(*args, **kwargs)
        begin = int((made.sigmas[: len(made.timesteps)] - sigma).abs().argmin())
        made.sigmas, made.timesteps = made.sigmas[begin:].clone(), made.timesteps[begin:].clone()
        made.sigmas[0] = sigma
        made.timesteps[0] = sigma * made.config.num_train_timesteps
        made.num_inference_steps = len(made.timesteps)
        # Timesteps may be rounded, so that the first two are equal: don't look them up.
        made.set_begin_index(0)

    made.set_timesteps = set_timesteps
    return made
