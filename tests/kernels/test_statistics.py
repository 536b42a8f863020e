"""Block statistics against literal loops in float64, and the Triton version against them too."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.kernels.joint_reference import first_order_moment, pool
from dit_accel.kernels.statistics import OPTIONAL, BlockStatistics, block_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = (2, 4, 8)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cannot do bfloat16")
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)],
    ids=["fp32", "fp16", "bf16"],
)


def random_qkv(
    video: int, text: int, heads: int, size: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Tokens with a mean, as real keys have one; text that shows wherever it leaks."""
    torch.manual_seed(0)
    qkv = []
    for _ in range(3):
        tokens = torch.randn(2, video + text, heads, size) + 2 * torch.randn(heads, size)
        tokens[:, video:] = float("nan")
        tokens[:, video::2] = float("inf")
        qkv.append(tokens.to(DEVICE, dtype))
    return qkv


def literal(
    qkv: list[Tensor], video: int, query_block: int, key_block: int
) -> dict[str, Tensor | dict[int, tuple[Tensor, Tensor]]]:
    """Every statistic by its definition, block by block, in float64."""
    q, k, v = (x[:, :video].double().transpose(1, 2) for x in qkv)  # [B, H, V, D]
    q_blocks, k_blocks, v_blocks = (
        x.split(b, 2) for x, b in ((q, query_block), (k, key_block), (v, key_block))
    )

    def mean_deviation(block: Tensor) -> Tensor:
        return (block - block.mean(2, keepdim=True)).abs().mean(2)

    def similarity(block: Tensor, group: int) -> Tensor:
        cosines = [
            torch.cosine_similarity(block[:, :, i], block[:, :, i + group - 1], dim=-1)
            for i in range(0, block.shape[2] - group + 1, group)
        ]
        return torch.stack(cosines).mean(0) if cosines else block.new_zeros(block.shape[:2])

    def pooled(block: Tensor, level: int) -> Tensor:
        means = [part.mean(2) for part in block.split(level, 2)]
        slots = -(-key_block // level)
        return torch.stack(means + [torch.zeros_like(means[0])] * (slots - len(means)), 2)

    moments = [
        torch.einsum("bhnd,bhne->bhde", k_j - k_j.mean(2, keepdim=True), v_j)
        for k_j, v_j in zip(k_blocks, v_blocks, strict=True)
    ]
    return {
        "query_mean": torch.stack([b.mean(2) for b in q_blocks], 2),
        "key_mean": torch.stack([b.mean(2) for b in k_blocks], 2),
        "value_mean": torch.stack([b.mean(2) for b in v_blocks], 2),
        "query_counts": torch.tensor([b.shape[2] for b in q_blocks], device=q.device),
        "key_counts": torch.tensor([b.shape[2] for b in k_blocks], device=q.device),
        "query_deviation": torch.stack([mean_deviation(b) for b in q_blocks], 2),
        "key_deviation": torch.stack([mean_deviation(b) for b in k_blocks], 2),
        "similarity": torch.stack(
            [torch.stack([similarity(b, g) for g in LEVELS], -1) for b in k_blocks], 2
        ),
        "moment": torch.stack(moments).sum(0),
        "moment_norm": torch.stack([h.square().sum((-1, -2)).sqrt() for h in moments], 2),
        "key_variance": torch.stack(
            [b.square().sum(-1).mean(-1) - b.mean(2).square().sum(-1) for b in k_blocks], 2
        ),
        "pooled": {
            level: (
                torch.cat([pooled(b, level) for b in k_blocks], 2),
                torch.cat([pooled(b, level) for b in v_blocks], 2),
            )
            for level in LEVELS
        },
    }


def check(
    found: BlockStatistics, expected: dict, tolerance: float, pooled_tolerance: float
) -> None:
    for field in fields(BlockStatistics):
        actual, wanted = getattr(found, field.name), expected[field.name]
        if wanted is None:
            assert actual is None
        elif field.name.endswith("counts"):
            assert actual.dtype == torch.int32
            assert actual.tolist() == wanted.tolist()
        elif field.name == "pooled":
            assert actual.keys() == wanted.keys()
            for level in wanted:
                for one, other in zip(actual[level], wanted[level], strict=True):
                    torch.testing.assert_close(
                        one.double(), other, rtol=pooled_tolerance, atol=pooled_tolerance
                    )
        else:
            # Relative to the largest: sums of many terms that cancel may be near 0.
            unit = wanted.abs().max().clamp(min=1)
            error = (actual.double() - wanted).abs().max() / unit
            assert error <= tolerance, (field.name, float(error))
            assert actual.shape == wanted.shape


sizes = pytest.mark.parametrize(
    ("video", "text", "query_block", "key_block", "size"),
    [
        pytest.param(1, 0, 16, 16, 16, id="one-token"),
        pytest.param(13, 7, 64, 64, 40, id="13-text7-head40"),
        pytest.param(63, 1, 16, 32, 64, id="63-blocks16x32"),
        pytest.param(100, 77, 128, 32, 20, id="100-text77-blocks128x32"),
        pytest.param(257, 0, 128, 128, 128, id="257-head128"),
        pytest.param(130, 3, 32, 128, 256, id="130-head256"),
        pytest.param(2000, 13, 64, 128, 96, id="2000-head96"),
    ],
)


@sizes
def test_torch_is_what_the_definitions_say(
    video: int, text: int, query_block: int, key_block: int, size: int
) -> None:
    qkv = random_qkv(video, text, 2, size)
    found = block_statistics(
        *qkv,
        query_block=query_block,
        key_block=key_block,
        text_length=text,
        wanted=OPTIONAL,
        pooled_levels=LEVELS,
    )
    assert found.moment is not None
    assert found.moment.dtype == torch.float64
    check(found, literal(qkv, video, query_block, key_block), 1e-13, 1e-13)


@dtypes
@sizes
def test_triton_is_what_the_definitions_say(
    video: int, text: int, query_block: int, key_block: int, size: int, dtype: torch.dtype
) -> None:
    qkv = random_qkv(video, text, 1, size, dtype)
    # Moments of larger heads do not fit in registers.
    wanted = OPTIONAL if size <= 128 else OPTIONAL - {"moment", "moment_norm"}
    found = block_statistics(
        *qkv,
        query_block=query_block,
        key_block=key_block,
        text_length=text,
        wanted=wanted,
        pooled_levels=LEVELS,
        backend="triton",
    )
    assert {found.query_mean.dtype, found.key_mean.dtype, found.value_mean.dtype} == {torch.float32}
    assert {x.dtype for pair in found.pooled.values() for x in pair} == {dtype}
    expected = literal(qkv, video, query_block, key_block)
    expected |= dict.fromkeys(OPTIONAL - wanted)
    eps = torch.finfo(dtype).eps
    check(found, expected, max(3e-5, eps / 2), 2 * eps if dtype == torch.float32 else eps)


@dtypes
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mean", [0, 30])
def test_moment_of_keys_far_from_zero(mean: float, dtype: torch.dtype, backend: str) -> None:
    # Products of such keys are a thousand times what is left of them. The same maths done plainly
    # in half precision is off by a third.
    qkv = random_qkv(700, 0, 2, 32, dtype)
    qkv[1] += mean
    found = block_statistics(
        *qkv, query_block=64, key_block=64, wanted=frozenset({"moment"}), backend=backend
    )
    assert found.moment is not None
    exact = first_order_moment(qkv[1].double(), qkv[2].double(), 64)
    # Tensor cores cut off the low bits of their sums: half of the inputs' rounding is allowed.
    cores = qkv[1].is_cuda and backend == "triton" and dtype != torch.float32
    tolerance = torch.finfo(dtype).eps / 2 if cores else (1e-4 if mean else 1e-5)
    assert (found.moment - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_made_that_is_not_wanted(backend: str) -> None:
    qkv = random_qkv(40, 0, 1, 16, torch.float32)
    found = block_statistics(*qkv, query_block=16, key_block=16, backend=backend)
    assert all(getattr(found, name) is None for name in OPTIONAL)
    assert found.pooled == {}


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_each_statistic_can_be_made_alone(name: str) -> None:
    qkv = random_qkv(40, 1, 1, 16, torch.float32)
    found = block_statistics(
        *qkv,
        query_block=16,
        key_block=32,
        text_length=1,
        wanted=frozenset({name}),
        backend="triton",
    )
    expected = literal(qkv, 40, 16, 32)[name]
    error = (getattr(found, name) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert all(getattr(found, other) is None for other in OPTIONAL - {name})


def test_long_sequences_sum_their_moment_over_several_stretches() -> None:
    qkv = random_qkv(2500, 0, 1, 16, torch.float32)
    found = block_statistics(
        *qkv, query_block=128, key_block=128, wanted=frozenset({"moment"}), backend="triton"
    )
    assert found.moment is not None
    expected = first_order_moment(qkv[1].double(), qkv[2].double(), 128)
    assert (found.moment - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["heads-first", "sliced", "transposed"])
def test_any_strides(layout: str, backend: str) -> None:
    def strided(x: Tensor) -> Tensor:
        if layout == "heads-first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.stack([x, x + 1], -1)[..., 0]
        return x.mT.contiguous().mT

    qkv = random_qkv(50, 5, 3, 24, torch.float32)
    found = block_statistics(
        *map(strided, qkv),
        query_block=16,
        key_block=32,
        text_length=5,
        wanted=OPTIONAL,
        pooled_levels=LEVELS,
        backend=backend,
    )
    check(found, literal(qkv, 50, 16, 32), 1e-5, 1e-6)


def test_pooled_tokens_are_those_of_the_joint_reference() -> None:
    qkv = random_qkv(100, 0, 2, 8)
    found = block_statistics(*qkv, query_block=32, key_block=32, pooled_levels=(8,))
    means, sizes, _ = pool(qkv[1], 32, 8)
    assert sizes.tolist() == [8] * 12 + [4]
    padded = found.pooled[8][0]
    assert padded.shape[2] == 16
    torch.testing.assert_close(padded[:, :, :13], means.transpose(1, 2))
    assert (padded[:, :, 13:] == 0).all()


def test_blocks_that_triton_cannot_cut_run_in_torch() -> None:
    qkv = random_qkv(50, 0, 1, 8)
    found = block_statistics(*qkv, query_block=7, key_block=12, pooled_levels=(8,))
    assert found.query_counts.tolist() == [7] * 7 + [1]
    # Blocks of 12 make one group of 8 and one of 4; the last block has two tokens.
    groups = [qkv[1][:, first:end].mean(1) for first, end in ((36, 44), (44, 48), (48, 50))]
    torch.testing.assert_close(found.pooled[8][0][:, :, 6:9], torch.stack(groups, 2))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query_block": 0}, OptionError, "query_block=0"),
        ({"text_length": 10}, GridMismatchError, "leaves no video token"),
        ({"text_length": -1}, GridMismatchError, "leaves no video token"),
        ({"wanted": frozenset({"median"})}, OptionError, "median"),
        ({"pooled_levels": (32,)}, OptionError, "pooled_levels"),
        ({"backend": "cuda"}, OptionError, "backend"),
    ],
)
def test_impossible_options_are_refused(options: dict, error: type, words: str) -> None:
    qkv = random_qkv(10, 0, 1, 8)
    with pytest.raises(error, match=words):
        block_statistics(*qkv, **{"query_block": 16, "key_block": 16, **options})


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v = random_qkv(10, 0, 1, 8)
    with pytest.raises(OptionError, match="one shape"):
        block_statistics(q, k[:, 1:], v, query_block=16, key_block=16)
    with pytest.raises(OptionError, match="one dtype"):
        block_statistics(q, k.float(), v, query_block=16, key_block=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"query_block": 24}, "blocks of"),
        ({"pooled_levels": (16,)}, "pools at levels"),
        ({"wanted": frozenset({"moment"})}, "up to 128, not 129"),
        ({}, "float64"),
    ],
)
def test_triton_says_what_it_cannot_do(options: dict, words: str) -> None:
    qkv = random_qkv(10, 0, 1, 129)
    with pytest.raises(OperatorUnavailableError, match=words):
        block_statistics(*qkv, **{"query_block": 16, "key_block": 16, **options}, backend="triton")
