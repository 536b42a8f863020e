"""What ``accelerate_pipeline(..., per_head=...)`` does: measure, share out, keep."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from dit_accel import __version__
from dit_accel.calibration import PipelineCall, bundled_calls
from dit_accel.calibration_file import circumstances, fingerprint
from dit_accel.errors import OptionError
from dit_accel.files import write_text
from dit_accel.grid import TokenOrder
from dit_accel.kinds import Method
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.per_head.allocation import allocate, interpolated
from dit_accel.per_head.curves import HeadCurves, measure_curves
from dit_accel.per_head.method import PerHead, at_level, check_base
from dit_accel.schedule import Schedule
from dit_accel.tuning_file import cache_folder

Row = dict[str, Any]
KIND = "dit-accel curves per head"
WORTH = 0.8
"""Share of one density's error above which sharing out is left.

What is predicted is the error of single calls, which later layers and steps then change. On
tiny-wan, predicted gains of .6 dB came out as -.3 and .1 dB in the latents, 1.3 dB as 1.4 dB.
"""


def share_out(
    pipe: Any,
    methods: Mapping[str, Method],
    general: Mapping[str, Any],
    schedule: Schedule,
    *,
    per_head: bool | str | Path,
    probe: PipelineCall | Sequence[PipelineCall] | None,
) -> PerHead:
    """Return the attention method among ``methods`` with a density for every layer and head.

    Args:
        pipe: a pipeline, not accelerated.
        methods: by kind.
        general: `accelerate_pipeline`'s own options; ``density`` is the mean over the heads of the
            layers that may be sparse.
        schedule: which layers stay dense; they take nothing from the budget.
        per_head: True, or a file that `save_curves` wrote.
        probe: what to measure on; see `accelerate_pipeline`.

    Raises:
        OptionError: if there is nothing to share out, or the file is of another model or method.
    """
    method = methods.get("attention")
    if not isinstance(method, AttentionMethod):
        raise OptionError("per_head shares out an attention method's density: name one.")
    check_base(method)
    if general["density"] is None:
        raise OptionError("per_head shares out a budget: give density=, the mean over the heads.")
    if "cache" in methods and methods["cache"].name == "remainder_cache":
        raise OptionError("per_head and remainder_cache don't go together: leave one out.")
    if per_head is True:
        curves = curves_of(pipe, method, probe)
    elif probe is not None:
        raise OptionError("per_head names a file with what was measured: leave probe out.")
    else:
        curves = load_curves(Path(str(per_head)), pipe, method)
    return per_head_method(method, curves, general["density"], schedule.layers)


def per_head_method(
    method: AttentionMethod,
    curves: HeadCurves,
    density: float,
    dense_layers: frozenset[int] = frozenset(),
) -> PerHead:
    """Return ``method`` with a density for every head whose mean cost is ``density``.

    It is one density for all unless sharing out leaves at most `WORTH` of that one's error.
    """
    method.at_density(density, curves.layout)  # refuses what it can't reach
    offers = _offers(method, curves)
    even_error, even = at_one_density(method, curves, density, dense_layers, offers)
    error, shared = shared_out(method, curves, density, dense_layers, offers)
    return shared if error <= WORTH * even_error else even


@dataclass(frozen=True)
class _Offer:
    """What heads may be asked for, in one order of the tokens.

    Attributes:
        order: of the tokens; None for the method's own.
        levels: whose patterns have this as their own order with the curves' text.
        asked: ``[layers, levels]``, the densities that stand for the levels.
        cost: ``[layers, levels]``, the share of pairs computed.
    """

    order: TokenOrder | None
    levels: Sequence[int]
    asked: Sequence[tuple[float, ...]]
    cost: Sequence[tuple[float, ...]]


def _offers(method: AttentionMethod, curves: HeadCurves) -> list[_Offer]:
    """Return the offers of a method: of a static one, one for each of its patterns' own orders.

    A static pattern is asked for by what it costs in the order that all heads share, with the
    layer's text: so it costs no more with another.
    """
    if not isinstance(method, StaticMethod):
        every = range(len(curves.levels))
        return [_Offer(None, every, [curves.levels] * len(curves.cost), curves.cost)]
    usual = curves.layout.text_length
    texts = dict.fromkeys([usual, *curves.text_lengths])
    layouts = {text: replace(curves.layout, text_length=text) for text in texts}
    patterns = {
        text: [at_level(method, level, layout) for level in curves.levels]
        for text, layout in layouts.items()
    }
    # Finding an order is slow, too.
    own = {text: [p.token_order(curves.layout.grid) for p in of] for text, of in patterns.items()}
    offers = []
    for order in dict.fromkeys(order for of in own.values() for order in of):
        costs = {
            text: tuple(_rounded_up(p.block_density(layouts[text], order)) for p in of)
            for text, of in patterns.items()
        }
        cost = [costs[text] for text in curves.text_lengths]
        levels = [i for i, its in enumerate(own[usual]) if its == order]
        offers.append(_Offer(order, levels, cost, cost))
    return offers


def shared_out(
    method: AttentionMethod,
    curves: HeadCurves,
    density: float,
    dense_layers: frozenset[int] = frozenset(),
    offers: Sequence[_Offer] = (),
) -> tuple[float, PerHead]:
    """Return the least total error at a mean cost of ``density``, and the densities that have it.

    All heads of a static method share one order of the tokens: that with the least total error.
    ``offers`` are those of the method, if they have been made: large grids take a minute.
    """
    offers = offers or _offers(method, curves)
    found = [_shared(method, curves, offer, density, dense_layers) for offer in offers]
    return min(found, key=itemgetter(0))


def at_one_density(
    method: AttentionMethod,
    curves: HeadCurves,
    density: float,
    dense_layers: frozenset[int] = frozenset(),
    offers: Sequence[_Offer] = (),
) -> tuple[float, PerHead]:
    """Return the total error of one density for all heads, and the method with that.

    ``offers`` as for `shared_out`.
    """
    layers = [layer for layer in range(len(curves.error)) if layer not in dense_layers]
    levels = range(len(curves.levels))
    errors = [sum(head[i] for layer in layers for head in curves.error[layer]) for i in levels]
    if not isinstance(method, StaticMethod):
        costs = [_mean_cost(curves.cost, layers, i) for i in levels]
        error = interpolated(list(zip(costs, errors, strict=True)), density)
        return error, PerHead(method, density, _table(curves, dense_layers, lambda layer: density))
    # It has nothing between two levels, and each in its own order.
    offer_of = {i: offer for offer in offers or _offers(method, curves) for i in offer.levels}
    costs = [_mean_cost(offer_of[i].cost, layers, i) for i in levels]
    payable = [i for i in levels if costs[i] <= density + 1e-6]
    best = min(payable, key=lambda i: (errors[i], costs[i]), default=0)
    asked, order = offer_of[best].asked, offer_of[best].order
    table = _table(curves, dense_layers, lambda layer: asked[layer][best])
    return errors[best], PerHead(method, density, table, order)


def _shared(
    method: AttentionMethod,
    curves: HeadCurves,
    offer: _Offer,
    density: float,
    dense_layers: frozenset[int],
) -> tuple[float, PerHead]:
    """Return the total error, infinite if the cost is over the budget, and the method."""
    places = [
        (layer, head)
        for layer, heads in enumerate(curves.error)
        for head in range(len(heads))
        if layer not in dense_layers
    ]
    of_heads = [
        list(zip(offer.cost[layer], curves.error[layer][head], strict=True))
        for layer, head in places
    ]
    table = [[1.0] * len(heads) for heads in curves.error]
    chosen = allocate(of_heads, density)
    for (layer, head), level in zip(places, chosen, strict=True):
        table[layer][head] = offer.asked[layer][level]
    of_chosen = [curve[level] for curve, level in zip(of_heads, chosen, strict=True)]
    spent = sum(c for c, _ in of_chosen) / max(len(places), 1)
    error = sum(e for _, e in of_chosen) if spent <= density + 1e-6 else float("inf")
    return error, PerHead(method, density, tuple(map(tuple, table)), offer.order)


def _table(
    curves: HeadCurves, dense_layers: frozenset[int], density_of: Callable[[int], float]
) -> tuple[tuple[float, ...], ...]:
    """Return one density for all heads of a layer, 1 in layers that stay dense."""
    return tuple(
        (1.0 if layer in dense_layers else density_of(layer),) * len(heads)
        for layer, heads in enumerate(curves.error)
    )


def _mean_cost(cost: Sequence[tuple[float, ...]], layers: Sequence[int], level: int) -> float:
    return sum(cost[layer][level] for layer in layers) / max(len(layers), 1)


def _rounded_up(density: float) -> float:
    """Round so that who asks for it gets it."""
    return min(math.ceil(density * 1e6) / 1e6, 1.0)


def curves_of(
    pipe: Any, method: AttentionMethod, probe: PipelineCall | Sequence[PipelineCall] | None
) -> HeadCurves:
    """Return error curves, from the user's cache folder if they were measured before."""
    if probe is None:
        calls = bundled_calls(pipe)
    else:
        calls = [probe] if isinstance(probe, Mapping) else list(probe)
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise OptionError("probe: give keyword arguments of pipe(...), or a list of these.")
    where = circumstances(pipe, method.name, {"method": repr(method)}, calls)
    folder = cache_folder()
    path = None
    if where is not None and folder is not None:
        digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / "per-head" / f"{digest}.json"
        if path.exists():
            try:
                return load_curves(path, pipe, method)
            except OptionError:
                pass  # damaged; measured anew
    curves = measure_curves(pipe, method, calls)
    if path is not None:
        save_curves(path, pipe, method, curves)
    return curves


def save_curves(path: Path, pipe: Any, method: AttentionMethod, curves: HeadCurves) -> None:
    """Write error curves, and what they hold for; ``per_head=path`` takes them."""
    content = {"kind": KIND, **asdict(_About.of(pipe, method)), "curves": curves.to_row()}
    write_text(path, json.dumps(content, indent=1) + "\n")


def load_curves(path: Path, pipe: Any, method: AttentionMethod) -> HeadCurves:
    """Return the error curves of a file.

    Raises:
        OptionError: if it can't be read, or is of another model, method or version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        curves = HeadCurves.read(content["curves"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"per_head file {str(path)!r} can't be read ({error}): measure it anew with "
            "per_head=True."
        ) from error
    for name, value in asdict(_About.of(pipe, method)).items():
        if content.get(name) != value:
            raise OptionError(
                f"per_head file {str(path)!r} is for {name} {content.get(name)}, here it is "
                f"{value}: measure it anew with per_head=True."
            )
    return curves


@dataclass(frozen=True)
class _About:
    """What curves hold for, beside a size: at another size the same heads stay the sparse ones."""

    dit_accel: str
    weights: list[str]
    method: str

    @classmethod
    def of(cls, pipe: Any, method: AttentionMethod) -> _About:
        parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
        return cls(__version__, [fingerprint(part) for part in parts], repr(method))
