"""Tables of what there is: families of models, and operators that attention runs in."""

from __future__ import annotations

import inspect

from dit_accel.operators import list_operators
from dit_accel.registry import family_class, list_families


def families() -> str:
    """Return a table of the model families."""
    rows = ["| family | diffusers pipelines |", "| --- | --- |"]
    rows += [f"| `{name}` | {family_class(name).pipelines} |" for name in list_families()]
    return "\n".join(rows) + "\n"


def operators() -> str:
    """Return a table of the operators, in the order in which "auto" asks them."""
    rows = ["| operator | what it is | what it needs | 8 bits |", "| --- | --- | --- | --- |"]
    for operator in list_operators():
        about = (inspect.getdoc(type(operator)) or "").splitlines()[0]
        needs = (inspect.getdoc(operator.why_not_here) or "").splitlines()[0]
        rounding = ", ".join(f"`{name}`" for name in operator.precisions)
        rows.append(f"| `{operator.name}` | {about} | {needs} | {rounding} |")
    return "\n".join(rows) + "\n"
