"""Controls made from the methods' dataclasses, so that a new method appears by itself."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from dit_accel.app import views
from dit_accel.app.settings import check_choices, check_option_text, check_plain
from dit_accel.cli.options import GENERAL, describe, method_hints
from dit_accel.kinds import Method
from dit_accel.registry import list_methods, method_class

Controls = dict[str, Any]
"""Components by name."""

PUBLISHED = "as published"
AUTO = "auto"
SMALL = {"block_size": "32", "min_tokens": "0"}
"""Options that suit the few tokens of the bundled models."""
_SECTION = re.compile(r"^(?:Args|Attributes):$", re.MULTILINE)
HELP = {
    "block_size": "Tokens per block of the lists, a power of two.",
    "remainder": "What stands for the blocks left out: nothing, or the mean of each.",
    "dense_steps": "First steps that stay dense: a number, or a share such as 0.25.",
    "dense_layers": "First layers that stay dense.",
    "min_tokens": "Videos of fewer tokens stay dense.",
    "backend": "Who computes sparse attention: auto, torch, triton, ...",
    "precision": "8-bit attention on a GPU: fp8, int8_fp8 or int8.",
}
LABELS = {
    "attention": "Attention",
    "cache": "Feature cache",
    "guidance": "Guidance",
    "resolution": "High resolution",
}


@dataclass
class MethodControls:
    """Which methods, and their options: a dropdown per kind and a group of controls per method.

    Attributes:
        kinds: of the methods to choose from.
        leave_out: options that the page has other controls for.
        general: whether the options of `accelerate_pipeline` that go with every attention method
            are shown.
        automatic: whether "auto" is among the attention methods.
        choices: a dropdown per kind, under the name that `choice` gives.
        boxes: a control per "method.option", and one per general option.
    """

    kinds: Sequence[str]
    leave_out: Sequence[str] = ()
    general: bool = True
    automatic: bool = True
    choices: Controls = field(default_factory=dict)
    boxes: Controls = field(default_factory=dict)
    _groups: Controls = field(default_factory=dict)
    _note: Any = None

    def draw_choices(self, chosen: Mapping[str, str]) -> None:
        """Draw the dropdowns and the words on what is chosen; ``chosen`` holds defaults by kind."""
        for kind in self.kinds:
            start = chosen.get(kind, "")
            self.choices[choice(kind)] = gr.Dropdown(
                [("none", ""), *self._offered(kind)],
                value=start if start in self._offered(kind) else "",
                label="Method" if kind == self.kinds[0] else LABELS.get(kind, kind.capitalize()),
                filterable=False,
            )
        self._note = gr.HTML(self._words(list(chosen.values())))

    def draw_options(self, chosen: Mapping[str, str]) -> None:
        """Draw the controls of all methods, of which those of the chosen ones are shown."""
        for kind in self.kinds:
            for method in list_methods(kind):
                with gr.Column(visible=chosen.get(kind) == method, min_width=0) as group:
                    gr.HTML(f"<h4>{method}</h4>")
                    self._draw_method(method)
                self._groups[method] = group
        if self.general and "attention" in self.kinds:
            with gr.Column(min_width=0):
                gr.HTML("<h4>Schedule and kernels</h4>")
                for name in GENERAL:
                    if name != "density":  # it has a slider of its own
                        info = HELP.get(name)
                        self.boxes[name] = gr.Textbox(
                            "", label=name, info=info, placeholder=PUBLISHED
                        )

    def connect(self) -> None:
        """Show the options of what is chosen."""
        outputs = [self._note, *self._groups.values()]

        def show(*chosen: str) -> list[Any]:
            updates = [gr.update(visible=name in chosen) for name in self._groups]
            return [self._words(chosen), *updates]

        for dropdown in self.choices.values():
            dropdown.change(
                show,
                list(self.choices.values()),
                outputs,
                show_progress="hidden",
                api_visibility="private",
            )

    @property
    def inputs(self) -> Controls:
        """All controls by name."""
        return {**self.choices, **self.boxes}

    @property
    def small(self) -> dict[Any, str]:
        """The controls of options that bundled models need, with the values that suit them."""
        options = {name: name.rpartition(".")[2] for name in self.boxes}
        return {self.boxes[n]: SMALL[option] for n, option in options.items() if option in SMALL}

    def chosen(self, given: Mapping[str, Any]) -> list[str]:
        """Return the names of the chosen methods.

        Raises:
            OptionError: if there is no such method.
        """
        names = [given[choice(kind)] for kind in self.kinds if given.get(choice(kind))]
        valid = [name for kind in self.kinds for name in self._offered(kind)]
        return check_choices("method", names, valid)

    def assignments(self, given: Mapping[str, Any]) -> list[str]:
        """Return what was set of the chosen methods' options, as ``name=value``.

        Raises:
            OptionError: if an option names a file.
        """
        names = self.chosen(given)
        owners = Counter(option for name in names for option in method_hints(name))
        found = []
        for method in names:
            for option, hint in method_hints(method).items():
                value = given.get(f"{method}.{option}")
                if value not in (None, ""):
                    text = check_option_text(option, str(value), may_name_a_file=takes_text(hint))
                    name = option if owners[option] == 1 else f"{method}.{option}"
                    found.append(f"{name}={text}")
        if any(name == AUTO or method_class(name).kind == "attention" for name in names):
            found += [
                f"{name}={check_plain(name, str(given[name]))}"
                for name in GENERAL
                if name in self.boxes and given.get(name) not in (None, "")
            ]
        return found

    def _offered(self, kind: str) -> list[str]:
        names = list_methods(kind)
        return [AUTO, *names] if kind == "attention" and self.automatic else names

    def _draw_method(self, method: str) -> None:
        cls, hints = method_class(method), method_hints(method)
        words = option_help(cls)
        shown = 0
        for option in fields(cls):
            if option.init and option.name not in (*GENERAL, *self.leave_out):
                name = f"{method}.{option.name}"
                self.boxes[name] = _option_control(option, hints[option.name], words)
                shown += 1
        if not shown:
            gr.HTML(views.note("No options of its own."))

    def _words(self, names: Sequence[str]) -> str:
        known = [method_class(name) for name in names if name in list_methods()]
        notes = [(cls.name, cls.summary(), _paper(cls)) for cls in known]
        automatic = [(AUTO, "The method published for this model, if there is one.", "")]
        return views.method_note((automatic if AUTO in names else []) + notes)


def choice(kind: str) -> str:
    """Return the name of the dropdown of a kind; "guidance" alone is the guidance scale's."""
    return f"{kind} method"


def _paper(cls: type[Method]) -> str:
    """Return a method's paper, unless its summary names it."""
    numbers = re.findall(r"\d{4}\.\d{5}", cls.paper)
    return "" if any(number in cls.summary() for number in numbers) else cls.paper


def takes_text(hint: Any) -> bool:
    """Whether any text is a value of this type, and so might name a file."""
    return hint is str or any(takes_text(part) for part in get_args(hint) if part is not hint)


def option_help(cls: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say of each option."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.cleandoc(base.__doc__ or "")
        _, section = _SECTION.split(f"{doc}\nArgs:\n", maxsplit=1)
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE):
            words = " ".join(text.replace("`", "").split())
            found[name] = words[0].upper() + words[1:]
    return found


def _typed(hint: Any) -> str:
    words = re.sub(r"\bint\b", "a whole number", describe(hint))
    words = re.sub(r"\bfloat\b", "a number", words)
    return f"{words[0].upper()}{words[1:]}."


def _option_control(option: Field[Any], hint: Any, words: Mapping[str, str]) -> Any:
    usual = "" if option.default in (MISSING, None) else f" Usually {option.default}."
    info = (words.get(option.name) or HELP.get(option.name) or _typed(hint)) + usual
    if hint is bool or get_origin(hint) is Literal:
        values = ["true", "false"] if hint is bool else [str(value) for value in get_args(hint)]
        return gr.Dropdown(
            [(PUBLISHED, ""), *values], value="", label=option.name, info=info, filterable=False
        )
    return gr.Textbox("", label=option.name, info=info, placeholder=PUBLISHED)
