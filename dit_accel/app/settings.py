"""What the page allows: its bounds, and the checks of what comes from a browser."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.models import generation_defaults, list_models

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME_OR_PAIRS = re.compile(r"[A-Za-z][\w-]*|\d+:\d+(\s*,\s*\d+:\d+)*")
_PLAIN = re.compile(r"[\w\s.,()+-]*")
_NUMBERS = {"steps": 1, "frames": 1, "height": 16, "width": 16, "seed": 0, "guidance": 0}
"""Numbers of a request with the least that they can be."""


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """How the page is served and how much may be asked of it.

    Attributes:
        host: address to listen on; the default can be reached from this computer alone.
        port: to listen on; 0 takes a free one.
        output: folder for results. Files are served from it alone, and only those written there
            since the page was started.
        models: folders and hub ids to offer beside the bundled models.
        allow_any_model: whether a hub id that is typed in the page is loaded.
        max_side: most pixels along a side.
        max_frames: most frames.
        max_pixels: most pixels in all frames together.
        max_steps: most denoising steps.
        max_guidance: highest guidance scale.
        max_prompt: most characters of a prompt.
        max_waiting: requests that may wait for the one under way.
        max_tokens: most tokens of a grid in the mask explorer.
        max_samples: most generations of one evaluation.

    Raises:
        OptionError: if a bound is below 1, a port is none, or a model doesn't exist.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    output: Path = Path("outputs/app")
    models: tuple[str, ...] = ()
    allow_any_model: bool = False
    max_side: int = 2048
    max_frames: int = 161
    max_pixels: int = 130_000_000
    max_steps: int = 100
    max_guidance: int = 50
    max_prompt: int = 1000
    max_waiting: int = 8
    max_tokens: int = 40_000
    max_samples: int = 500

    def __post_init__(self) -> None:
        """Check all that can be checked before the page is built."""
        for name, value in vars(self).items():
            if name.startswith("max_") and value < 1:
                raise OptionError(f"{name}={value} must be at least 1.")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"port={self.port} is no port: take one from 1024 to 65535.")
        if self.output.exists() and not self.output.is_dir():
            raise OptionError(f"output {str(self.output)!r} is a file: name a folder.")
        for model in self.models:
            generation_defaults(model)

    @property
    def offered(self) -> list[str]:
        """Models that can be chosen without typing."""
        return list(dict.fromkeys([*list_models(), *self.models]))

    @property
    def is_local(self) -> bool:
        """Whether only this computer can reach the page."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def check_model(self, model: object) -> str:
        """Return the model if it may be loaded; a browser can't name folders.

        Raises:
            OptionError: saying what may be.
        """
        name = str(model or "").strip()
        if name in self.offered:
            return name
        if not name:
            raise OptionError("no model is chosen: take one of the list.")
        if not self.allow_any_model:
            raise OptionError(
                f"model {_short(name)} is not on this page's list."
                f"{did_you_mean(name, self.offered)} Whoever starts the page can add it "
                "with --model, or allow all models of the hub with --allow-any-model."
            )
        if not _HUB_ID.fullmatch(name) or Path(name).exists():
            raise OptionError(
                f"model {_short(name)} is no hub id: write org/name, such as "
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers. Folders are added with --model when the page "
                "is started."
            )
        return name

    def check_request(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return prompt, seed and numbers of a request, None where nothing was given.

        Args:
            given: values of the page's controls by name.

        Raises:
            OptionError: if one is out of bounds.
        """
        checked: dict[str, Any] = {"prompt": self.check_prompt(given.get("prompt"))}
        for name, least in _NUMBERS.items():
            checked[name] = self._number(name, given.get(name), least)
        checked["seed"] = checked["seed"] or 0
        return checked

    def check_prompt(self, prompt: object) -> str:
        """Return a prompt without control characters.

        Raises:
            OptionError: if it is empty or too long.
        """
        text = "".join(c if c.isprintable() else " " for c in str(prompt or "")).strip()
        if not text:
            raise OptionError("the prompt is empty: say what to generate.")
        if len(text) > self.max_prompt:
            raise OptionError(
                f"the prompt has {len(text)} characters and this page takes {self.max_prompt}: "
                "shorten it."
            )
        return text

    def check_volume(self, height: int | None, width: int | None, frames: int | None) -> None:
        """Refuse more pixels than `max_pixels`, of which None means unknown."""
        pixels = math.prod(n for n in (height, width, frames) if n is not None)
        if pixels > self.max_pixels:
            raise OptionError(
                f"{frames or 1} frames of {height} x {width} are {pixels / 1e6:.0f} million pixels "
                f"and this page makes {self.max_pixels / 1e6:.0f} million: make it smaller or "
                "shorter."
            )

    def _number(self, name: str, value: object, least: int) -> Any:
        most = {
            "steps": self.max_steps,
            "frames": self.max_frames,
            "height": self.max_side,
            "width": self.max_side,
            "seed": 2**63 - 1,
            "guidance": self.max_guidance,
        }[name]
        return check_number(name, value, least, most, whole=name != "guidance")


def check_number(name: str, value: object, least: int, most: int, *, whole: bool = True) -> Any:
    """Return a number from the page; None if none was given.

    Raises:
        OptionError: if it is no number or out of bounds.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"{name}={_short(str(value))} is no number: write one in digits.")
    if whole and value != int(value):
        raise OptionError(f"{name}={value} is no whole number: take {round(value)}.")
    if not least <= value <= most:
        raise OptionError(f"{name}={value:,} is out of range: take {least:,} to {most:,}.")
    return int(value) if whole else value


def check_option_text(name: str, text: str, *, may_name_a_file: bool) -> str:
    """Return an option's text, unless it could be the path of a file.

    Args:
        name: of the option.
        text: as typed.
        may_name_a_file: whether outside the page this option takes paths too.
    """
    text = text.strip()
    if may_name_a_file and text and not _NAME_OR_PAIRS.fullmatch(text):
        raise OptionError(
            f"{name}={_short(text)}: files can't be named in the page. Write pairs such as "
            "1:3, 2:0 (layer:head), or the name of a set that the model's folder brings."
        )
    return text


def check_plain(name: str, text: str) -> str:
    """Return a text of letters, digits and a few signs; a path with folders is none."""
    if not _PLAIN.fullmatch(text):
        raise OptionError(f"{name}={_short(text)}: write a name or numbers.")
    return text


def check_choices(name: str, given: Sequence[str], valid: Sequence[str]) -> list[str]:
    """Return what was chosen; a browser can send anything."""
    for one in given:
        if one not in valid:
            raise OptionError(f"unknown {name} {_short(str(one))}.{did_you_mean(str(one), valid)}")
    return list(given)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
