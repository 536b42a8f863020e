import pytest
import torch
import torch.nn.functional as F

from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import tile_lists_from_dense


@pytest.mark.parametrize("scale", [None, 0.3], ids=["default-scale", "own-scale"])
def test_masked_attention_is_sdpa_with_a_mask(scale: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 21, 3, 8, dtype=torch.float64).unbind()
    mask = torch.rand(2, 3, 21, 21) < 0.5
    mask[..., 0] = True
    out, lse = masked_attention(query, key, value, mask, scale)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask, scale=scale
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * (scale or 8**-0.5)
    torch.testing.assert_close(lse.exp(), (scores.exp() * mask).sum(-1))


def test_a_query_without_keys_gets_zero_and_minus_infinity() -> None:
    query, key, value = torch.randn(3, 1, 4, 1, 8).unbind()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    out, lse = masked_attention(query, key, value, mask)
    assert out[0, 2].abs().max() == 0
    assert lse[0, 0, 2] == float("-inf")
    assert out.isfinite().all()


@pytest.mark.parametrize("text_first", [False, True], ids=["text-last", "text-first"])
def test_text_sees_and_is_seen_by_everything(text_first: bool) -> None:
    video = torch.rand(40, 40) < 0.3
    mask = lists_to_mask(tile_lists_from_dense(video, 16), 7, text_first)[0, 0]
    first = 7 if text_first else 0
    inside = torch.zeros(47, dtype=torch.bool)
    inside[first : first + 40] = True
    assert torch.equal(mask[inside][:, inside], video)
    assert mask[~inside].all()
    assert mask[:, ~inside].all()
