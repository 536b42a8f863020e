import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dit_accel.errors import GridMismatchError, OptionError
from dit_accel.kernels.reference import lists_to_mask
from dit_accel.kernels.tiles import tile_lists_from_block_mask, tile_lists_from_dense


def _blocky_mask(*shape: int, block: int) -> Tensor:
    """A random mask with empty, full and mixed tiles."""
    mask = torch.rand(*shape) < 0.4
    mask[..., :block, :] = True
    mask[..., :, :block] = False
    mask[..., -(shape[-1] % block) :] = True
    return mask


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("num_tokens", [16, 63, 100, 300])
def test_dense_masks_survive_the_round_trip(num_tokens: int, block: int) -> None:
    torch.manual_seed(0)
    mask = _blocky_mask(2, 3, num_tokens, num_tokens, block=block)
    lists = tile_lists_from_dense(mask, block)
    assert torch.equal(lists_to_mask(lists), mask)
    assert lists.allowed_pairs() == pytest.approx(mask.sum((-1, -2)).double().mean().item())


def test_a_ragged_last_tile_counts_as_full_when_all_its_tokens_are_allowed() -> None:
    lists = tile_lists_from_dense(torch.ones(100, 100, dtype=torch.bool), 32)
    assert lists.full_count.unique().tolist() == [4]
    assert lists.partial_count.max() == 0
    assert lists.allowed_pairs() == 100 * 100


@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per-head"])
@pytest.mark.parametrize("num_tokens", [63, 100, 2000])
def test_block_masks_convert_exactly(num_tokens: int, heads: int) -> None:
    def band(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() < 150 + 40 * h

    block_mask = create_block_mask(
        band, 1, heads, num_tokens, num_tokens, device="cpu", BLOCK_SIZE=64
    )
    token = torch.arange(num_tokens)
    distance = (token[:, None] - token).abs()
    expected = torch.stack([distance < 150 + 40 * h for h in range(heads)])[None]
    assert torch.equal(lists_to_mask(tile_lists_from_block_mask(block_mask, num_tokens)), expected)


def test_equal_patterns_are_stored_once() -> None:
    band = create_block_mask(
        lambda b, h, q, k: (q - k).abs() < 100, 1, 1, 4096, 4096, device="cpu", BLOCK_SIZE=64
    )
    lists = tile_lists_from_block_mask(band, 4096)
    assert lists.partial_count.sum() > 100
    assert len(lists.bits) == 4


def test_patterns_that_differ_in_one_bit_stay_apart() -> None:
    mask = torch.ones(64, 64 * 64, dtype=torch.bool)
    mask[torch.arange(64), torch.arange(64) * 65] = False
    mask = mask.repeat(64, 1)
    lists = tile_lists_from_dense(mask, 64)
    assert len(lists.bits) == 64
    assert torch.equal(lists_to_mask(lists)[0, 0], mask)


def test_partial_tiles_that_are_full_or_empty_are_relisted() -> None:
    count = torch.full((1, 1, 2), 2, dtype=torch.int32)
    index = torch.tensor([0, 1], dtype=torch.int32).expand(1, 1, 2, 2).contiguous()
    block_mask = BlockMask.from_kv_blocks(
        count, index, BLOCK_SIZE=(32, 32), mask_mod=lambda b, h, q, k: k < 32, seq_lengths=(64, 64)
    )
    lists = tile_lists_from_block_mask(block_mask, 64)
    assert lists.full_count.tolist() == [[[1, 1]]]
    assert lists.partial_count.tolist() == [[[0, 0]]]


def test_impossible_block_masks_are_refused() -> None:
    def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= 0

    oblong = create_block_mask(everything, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=(128, 64))
    with pytest.raises(OptionError, match="square"):
        tile_lists_from_block_mask(oblong, 256)
    square = create_block_mask(everything, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(GridMismatchError, match="5"):
        tile_lists_from_block_mask(square, 300)
    with pytest.raises(OptionError, match="power of two"):
        tile_lists_from_dense(torch.ones(96, 96, dtype=torch.bool), 48)
