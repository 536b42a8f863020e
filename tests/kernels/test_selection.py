"""The torch version against literal loops, and the Triton version against that, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.errors import OperatorUnavailableError, OptionError
from dit_accel.kernels.selection import assign_levels, cumulative_mask, top_k_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
ENDS = {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}


def ranked(row: list[float], forced: list[bool]) -> tuple[list[int], list[int]]:
    """The forced columns, and the others that may be chosen, best first."""
    allowed = [i for i, x in enumerate(row) if x > -INF]
    if not allowed:
        allowed = [i for i, x in enumerate(row) if x == -INF]
    always = [i for i, f in enumerate(forced) if f]
    return always, sorted(set(allowed) - set(always), key=lambda i: (-row[i], i))


def first_part(
    row: list[float], forced: list[bool], count: int, share: float | None, crossing: bool
) -> set[int]:
    always, others = ranked(row, forced)
    weight = [max(x, 0.0) if x > -INF else 0.0 for x in row]
    if sum(weight) == 0:
        allowed, _ = ranked(row, [False] * len(row))[::-1]
        weight = [float(i in allowed) for i in range(len(row))]
    kept, reached = set(always), sum(weight[i] for i in always)
    # Shares are compared with a tolerance of about a millionth of the row.
    limit = -1.0 if share is None else (share + 1.5e-6) * sum(weight)
    for i in others:
        in_count = len(kept) < count
        in_share = (reached if crossing else reached + weight[i]) <= limit
        if not in_count and not in_share:
            break
        kept.add(i)
        reached += weight[i]
    return kept


def literal(
    scores: Tensor, forced: Tensor | None, choose: Callable[[list[float], list[bool]], list[int]]
) -> Tensor:
    rows = scores.double().flatten(0, -2).tolist()
    always = torch.zeros_like(scores, dtype=torch.bool)
    if forced is not None:
        always = forced.expand_as(scores)
    chosen = map(choose, rows, always.flatten(0, -2).tolist())
    return torch.tensor(list(chosen), device=scores.device).view_as(scores)


def as_row(kept: set[int], columns: int) -> list[int]:
    return [int(i in kept) for i in range(columns)]


def random_weights(rows: int, columns: int, kind: str) -> Tensor:
    torch.manual_seed(0)
    shape = (2, 2, rows, columns)
    if kind == "softmax":
        return torch.randn(shape).mul(3).softmax(-1).to(DEVICE)
    if kind == "ties":
        return torch.randint(0, 4, shape).float().to(DEVICE)
    weights = torch.randn(shape).mul(2).exp()
    weights[..., 0, :] = 1.0
    weights[..., 1, :] = 0.0
    weights[..., 2, :] = -INF
    weights[..., 3, :] = NAN
    weights[torch.rand(shape) < 0.2] = -INF
    weights[torch.rand(shape) < 0.1] = NAN
    weights[..., 4, :] = torch.where(torch.rand(columns) < 0.5, -0.0, 0.0)
    return weights.to(DEVICE)


def random_forced(weights: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    forced = torch.rand(weights.shape[-2:], generator=generator) < 0.15
    forced[-1] = True
    return forced.to(DEVICE)


cases = pytest.mark.parametrize(
    ("rows", "columns", "kind"),
    [
        pytest.param(1, 1, "softmax", id="one-block"),
        pytest.param(3, 13, "softmax", id="13"),
        pytest.param(5, 40, "ties", id="40-ties"),
        pytest.param(9, 37, "odd", id="37-inf-nan"),
        pytest.param(2, 591, "softmax", id="591"),
    ],
)
with_forced = pytest.mark.parametrize("use_forced", [False, True], ids=["free", "forced"])
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@with_forced
@cases
@pytest.mark.parametrize("k", [0, 1, 6, 10_000])
def test_top_k(rows: int, columns: int, kind: str, k: int, use_forced: bool) -> None:
    scores = random_weights(rows, columns, kind)
    forced = random_forced(scores) if use_forced else None
    expected = literal(
        scores, forced, lambda row, f: as_row(first_part(row, f, k, None, False), columns)
    )
    chosen = top_k_mask(scores, k, forced=forced, backend="torch")
    assert chosen.dtype == torch.bool
    assert torch.equal(chosen, expected.bool())


@with_forced
@cases
@pytest.mark.parametrize("crossing", [False, True], ids=["below", "crossing"])
@pytest.mark.parametrize(("share", "at_least"), [(0, 0), (0.3, 0), (0.3, 5), (0.875, 1), (1, 0)])
def test_cumulative(
    rows: int,
    columns: int,
    kind: str,
    share: float,
    at_least: int,
    crossing: bool,
    use_forced: bool,
) -> None:
    weights = random_weights(rows, columns, kind)
    forced = random_forced(weights) if use_forced else None
    expected = literal(
        weights,
        forced,
        lambda row, f: as_row(first_part(row, f, at_least, share, crossing), columns),
    )
    chosen = cumulative_mask(weights, share, at_least, crossing, forced=forced, backend="torch")
    assert torch.equal(chosen, expected.bool())


@with_forced
@cases
@pytest.mark.parametrize("mode", ["threshold", "top_k"])
@pytest.mark.parametrize(
    "ends",
    [ENDS, {1: 0.1, 2: 0.1, 4: 0.29, 8: 0.29}, {1: 0.75}, {2: 0.0, 8: 1.0}],
    ids=["paper", "empty-parts", "binary", "two-levels"],
)
def test_levels(
    rows: int,
    columns: int,
    kind: str,
    ends: dict[int, float],
    mode: str,
    use_forced: bool,
) -> None:
    weights = random_weights(rows, columns, kind)
    forced = random_forced(weights) if use_forced else None

    def choose(row: list[float], always: list[bool]) -> list[int]:
        levels = [0] * columns
        for level in sorted(ends, reverse=True):
            share = ends[level] if mode == "threshold" else None
            count = 1 if mode == "threshold" else max(1, int(columns * ends[level] + 1e-6))
            for i in first_part(row, always, count, share, False):
                levels[i] = level
        return levels

    chosen = assign_levels(weights, ends, mode=mode, forced=forced, backend="torch")
    assert chosen.dtype == torch.int8
    assert torch.equal(chosen, literal(weights, forced, choose).to(torch.int8))


choices = pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda w, **by: top_k_mask(w, 0, **by), id="top-0"),
        pytest.param(lambda w, **by: top_k_mask(w, 6, **by), id="top-6"),
        pytest.param(lambda w, **by: cumulative_mask(w, 0, **by), id="none"),
        pytest.param(lambda w, **by: cumulative_mask(w, 1, 0, False, **by), id="all"),
        pytest.param(lambda w, **by: cumulative_mask(w, 0.31, 4, **by), id="crossing"),
        pytest.param(lambda w, **by: cumulative_mask(w, 0.77, 4, False, **by), id="below"),
        pytest.param(lambda w, **by: assign_levels(w, ENDS, **by), id="levels"),
        pytest.param(lambda w, **by: assign_levels(w, ENDS, mode="top_k", **by), id="by-rank"),
        pytest.param(lambda w, **by: assign_levels(w, {2: 0.0, 8: 1.0}, **by), id="two-levels"),
    ],
)


@choices
@with_forced
def test_triton_chooses_the_same(choose: Callable[..., Tensor], use_forced: bool) -> None:
    kinds = [random_weights(rows, 37, kind)[0, 0] for rows, kind in ((6, "odd"), (2, "ties"))]
    weights = torch.cat([*kinds, random_weights(1, 37, "softmax")[0, 0]])[None, None]
    forced = random_forced(weights) if use_forced else None
    a, b = (choose(weights, forced=forced, backend=backend) for backend in ("torch", "triton"))
    assert torch.equal(a, b)


@choices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_chooses_the_same_of_2000(choose: Callable[..., Tensor], dtype: torch.dtype) -> None:
    # Few distinct values in half precision: many ties, and parts that end inside them.
    torch.manual_seed(0)
    weights = torch.randn(1, 1, 2, 2000, device=DEVICE).mul(4).softmax(-1).to(dtype)
    a, b = (choose(weights, backend=backend) for backend in ("torch", "triton"))
    assert torch.equal(a, b)


@backends
def test_ends_that_are_met_exactly_count_as_met(backend: str) -> None:
    weights = torch.full((1, 1, 1, 10), 0.1, device=DEVICE)
    levels = assign_levels(weights, ENDS, backend=backend)
    assert levels.flatten().tolist() == [1, 1, 1, 1, 2, 4, 8, 8, 0, 0]


@backends
def test_a_block_beyond_all_ends_is_kept_all_the_same(backend: str) -> None:
    weights = torch.tensor([0.05, 0.9, 0.05], device=DEVICE).view(1, 1, 1, 3)
    assert assign_levels(weights, ENDS, backend=backend).flatten().tolist() == [0, 1, 0]
    free = assign_levels(weights, ENDS, at_least=0, backend=backend)
    assert free.flatten().tolist() == [0, 0, 0]


@backends
def test_extreme_weights(backend: str) -> None:
    rows = [[INF, 1.0, INF, 0.0], [1e-45, 3e-45, 0.0, 1e-45], [3e38, 3e38, 1e-38, -5.0]]
    weights = torch.tensor(rows, device=DEVICE).view(1, 1, 3, 4)
    chosen = cumulative_mask(weights, 0.5, backend=backend)
    assert chosen[0, 0].tolist() == [
        [True, False, True, False],
        [True, True, False, False],
        [True, True, False, False],
    ]


@backends
def test_any_strides(backend: str) -> None:
    weights = random_weights(5, 2, "softmax").permute(0, 1, 3, 2)
    forced = random_forced(weights).T.contiguous().T
    a = assign_levels(weights, ENDS, forced=forced, backend=backend)
    b = assign_levels(weights.contiguous(), ENDS, forced=forced.contiguous(), backend="torch")
    assert torch.equal(a, b)


def test_float64_keeps_its_precision() -> None:
    scores = 1 + torch.tensor([0.0, 2e-16, 4e-16], dtype=torch.float64).view(1, 1, 1, 3)
    assert top_k_mask(scores, 1).flatten().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: top_k_mask(w, -1), "k=-1"),
        (lambda w: cumulative_mask(w, 1.5), "between 0 and 1"),
        (lambda w: cumulative_mask(w, NAN), "between 0 and 1"),
        (lambda w: cumulative_mask(w, 0.5, -1), "at_least=-1"),
        (lambda w: assign_levels(w, {}), "must name levels"),
        (lambda w: assign_levels(w, {3: 0.5}), "must name levels"),
        (lambda w: assign_levels(w, {1: 0.5, 2: 0.4}), "must not fall"),
        (lambda w: assign_levels(w, ENDS, mode="best"), "mode='best'"),
        (lambda w: assign_levels(w, ENDS, at_least=-1), "at_least=-1"),
        (lambda w: top_k_mask(w, 1, backend="cuda"), "backend='cuda'"),
    ],
)
def test_impossible_options_are_refused(call: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        call(torch.ones(1, 1, 2, 3))


def test_triton_says_what_it_cannot_rank() -> None:
    with pytest.raises(OperatorUnavailableError, match="float64"):
        top_k_mask(torch.ones(1, 1, 2, 3, dtype=torch.float64), 1, backend="triton")
