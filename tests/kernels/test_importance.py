"""Sampled importance against a literal loop in float64."""

import pytest
import torch
from torch import Tensor

from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.kernels.importance import sampled_importance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.gpu  # the interpreter cannot do bfloat16


def random_tokens(video: int, text: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Query and key, whose text rows show wherever they leak."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 2, video + text, 2, size).to(DEVICE, dtype)
    tokens[:, :, video:] = float("nan")
    tokens[:, :, video::2] = float("inf")
    return list(tokens)


def literal(
    query: Tensor, key: Tensor, blocks: tuple[int, int], samples: tuple[int, int]
) -> Tensor:
    """The formula, one pair of blocks at a time."""
    video = query.shape[1]
    rows, columns = (
        [
            [b + i * size // n for i in range(n) if b + i * size // n < min(b + size, video)]
            for b in range(0, video, size)
        ]
        for size, n in zip(blocks, samples, strict=True)
    )
    q, k = query.double().transpose(1, 2), key.double().transpose(1, 2)
    scores = q @ k.mT * query.shape[-1] ** -0.5
    attention = scores[..., [i for block in columns for i in block]].softmax(-1)
    weights = torch.zeros(
        *q.shape[:2], len(rows), len(columns), dtype=torch.double, device=q.device
    )
    for i, block in enumerate(rows):
        first = 0
        for j, others in enumerate(columns):
            pairs = attention[:, :, block, first : first + len(others)]
            weights[:, :, i, j] = pairs.amax((-1, -2))
            first += len(others)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        pytest.param(torch.float64, "torch", id="torch-fp64"),
        pytest.param(torch.float32, "triton", id="triton-fp32"),
        pytest.param(torch.float16, "triton", id="triton-fp16"),
        pytest.param(torch.bfloat16, "triton", id="triton-bf16", marks=needs_gpu),
    ],
)
@pytest.mark.parametrize(
    ("video", "text", "blocks", "asked", "samples", "size"),
    [
        pytest.param(1, 0, (16, 16), None, (2, 2), 16, id="one-token"),
        pytest.param(63, 7, (16, 32), None, (2, 4), 40, id="63-text7-head40"),
        pytest.param(130, 0, (128, 128), None, (16, 16), 64, id="130"),
        pytest.param(300, 77, (128, 32), 16, (16, 16), 128, id="300-text77-16samples"),
        pytest.param(1001, 1, (64, 16), 2, (2, 2), 20, id="1001-2samples"),
        pytest.param(100, 0, (32, 16), 64, (32, 16), 32, id="every-token"),
        pytest.param(90, 0, (48, 32), 7, (7, 7), 256, id="odd-samples-head256"),
    ],
)
def test_is_what_the_formula_says(
    video: int,
    text: int,
    blocks: tuple[int, int],
    asked: int | None,
    samples: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    query, key = random_tokens(video, text, size, dtype)
    if backend == "triton" and samples[1] == 7:
        with pytest.raises(OperatorUnavailableError, match="power of two"):
            importance(query, key, blocks, asked, text, backend)
        return
    weights = importance(query, key, blocks, asked, text, backend)
    expected = literal(query[:, :video], key[:, :video], blocks, samples)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(weights.double(), expected, rtol=tolerance, atol=tolerance)


def importance(
    query: Tensor,
    key: Tensor,
    blocks: tuple[int, int],
    samples: int | None,
    text: int,
    backend: str,
) -> Tensor:
    return sampled_importance(
        query,
        key,
        query_block=blocks[0],
        key_block=blocks[1],
        text_length=text,
        samples_per_block=samples,
        backend=backend,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_leaves_random_numbers_alone_and_takes_large_scores(backend: str) -> None:
    query, key = random_tokens(64, 0, 16, torch.float32)
    before = torch.get_rng_state()
    weights = importance(query * 200, key * 200, (16, 16), None, 0, backend)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_long_rows_are_done_in_chunks_with_the_same_result() -> None:
    query, key = random_tokens(3000, 0, 8, torch.float64)
    whole = importance(query, key, (16, 16), 16, 0, "torch")
    torch.testing.assert_close(whole, literal(query, key, (16, 16), (16, 16)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query_block": 0}, OptionError, "query_block=0"),
        ({"samples_per_block": 0}, OptionError, "samples_per_block=0"),
        ({"scale": -1.0}, OptionError, "scale=-1.0"),
        ({"text_length": 8}, GridMismatchError, "leaves no video token"),
    ],
)
def test_impossible_options_are_refused(options: dict, error: type, words: str) -> None:
    tokens = torch.randn(1, 8, 1, 4)
    with pytest.raises(error, match=words):
        sampled_importance(tokens, tokens, **{"query_block": 4, "key_block": 4, **options})
    with pytest.raises(OptionError, match="one shape"):
        sampled_importance(tokens, tokens[:, 1:], query_block=4, key_block=4)
