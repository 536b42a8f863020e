import pytest
import torch

from dit_accel.kernels import joint_gather
from dit_accel.kernels.joint_gather import gathered_joint_attention
from dit_accel.kernels.joint_reference import joint_attention
from dit_accel.kernels.statistics import block_statistics

EXACT, PYRAMID = (0, 1), (0, 1, 2, 4, 8)


def inputs(video, text, dtype=torch.float64, heads=2, size=8, batch=2):
    generator = torch.Generator().manual_seed(video + text)
    return [
        torch.randn(batch, video + text, heads, size, generator=generator, dtype=torch.float64).to(
            dtype
        )
        for _ in range(3)
    ]


def random_levels(video, query_block, key_block, choices, batch=2, heads=2):
    generator = torch.Generator().manual_seed(7)
    shape = batch, heads, -(-video // query_block), -(-video // key_block)
    return torch.tensor(choices, dtype=torch.int8)[
        torch.randint(len(choices), shape, generator=generator)
    ]


@pytest.mark.parametrize("chunk", [1, 1 << 21], ids=["row-by-row", "all-at-once"])
@pytest.mark.parametrize("choices", [EXACT, PYRAMID, (8,), (0,), (1,)], ids=str)
@pytest.mark.parametrize(
    ("video", "text", "query_block", "key_block"),
    [(63, 0, 16, 16), (100, 7, 32, 16), (100, 5, 16, 32), (13, 3, 16, 16), (200, 0, 16, 64)],
    ids=str,
)
@pytest.mark.parametrize("remainder", [False, True], ids=["dropped", "remainder"])
def test_matches_the_reference(
    video, text, query_block, key_block, choices, remainder, chunk, monkeypatch
):
    monkeypatch.setattr(joint_gather, "CHUNK", chunk)
    q, k, v = inputs(video, text)
    levels = random_levels(video, query_block, key_block, choices)
    options = {
        "query_block": query_block,
        "key_block": key_block,
        "text_length": text,
        "remainder": remainder,
        "first_order": remainder,
        "row_factor": torch.rand(2, 2, levels.shape[-2], dtype=torch.float64),
        "added": torch.randn(2, 2, levels.shape[-2], 8, dtype=torch.float64),
    }
    out, lse = gathered_joint_attention(q, k, v, levels, **options, return_lse=True)
    expected, expected_lse = joint_attention(q, k, v, levels, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


def test_other_queries_than_keys():
    query, key, value = inputs(100, 0)
    levels = random_levels(100, 16, 16, (0, 1, 2))
    sizes = {"query_block": 16, "key_block": 16, "remainder": True, "first_order": True}
    whole, whole_lse = joint_attention(query, key, value, levels, **sizes)
    part, lse = gathered_joint_attention(
        query[:, :40], key, value, levels[:, :, :3], return_lse=True, **sizes
    )
    torch.testing.assert_close(part, whole[:, :40])
    torch.testing.assert_close(lse, whole_lse[..., :40])


def test_uses_given_statistics_and_shares_levels_over_batch_and_heads():
    q, k, v = inputs(100, 5)
    levels = random_levels(100, 16, 16, PYRAMID, batch=1, heads=1)
    blocks = {"query_block": 16, "key_block": 16, "text_length": 5}
    given = block_statistics(
        q, k, v, **blocks, wanted=frozenset({"moment"}), pooled_levels=(2, 4, 8)
    )
    options = {**blocks, "remainder": True, "first_order": True, "scale": 0.7}
    out, lse = gathered_joint_attention(q, k, v, levels, **options, statistics=given)
    assert lse is None
    expected, _ = joint_attention(q, k, v, levels, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    q, k, v = inputs(100, 7, dtype)
    levels = random_levels(100, 16, 32, PYRAMID)
    options = {"query_block": 16, "key_block": 32, "text_length": 7, "remainder": True}
    out, _ = gathered_joint_attention(q, k, v, levels, **options)
    exact, _ = joint_attention(q.double(), k.double(), v.double(), levels, **options)
    assert out.dtype == dtype
    # Pooled tokens and the output are rounded to the dtype; all between is float32.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_large_scores_in_the_remainder_do_not_overflow():
    q, k, v = inputs(64, 0)
    k[:, 48:] = 200 * q.mean((0, 1), keepdim=True).sign()
    levels = torch.zeros(1, 1, 4, 4, dtype=torch.int8)
    levels[..., 0] = 1
    options = {"query_block": 16, "key_block": 16, "remainder": True, "first_order": True}
    out, _ = gathered_joint_attention(q, k, v, levels, **options)
    expected, _ = joint_attention(q, k, v, levels, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
