import pytest
import torch
from mask_vectors import any_and_all
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from dit_accel.call import TokenLayout
from dit_accel.grid import RASTER
from dit_accel.plan import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockSparsePlan,
    block_mask_from_states,
    dense_block_states,
    with_text,
)

SIZE = 16
LENGTHS = [63, 64, 100]
TEXTS = [0, 1, 15, 16, 37]


def random_mask(tokens: int) -> Tensor:
    """A mask of [N, N] with empty, partly and wholly allowed blocks."""
    generator = torch.Generator().manual_seed(tokens)
    blocks = -(-tokens // SIZE)
    kind = torch.randint(0, 3, (blocks, blocks), generator=generator)
    kind = kind.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)[:tokens, :tokens]
    coin = torch.rand(tokens, tokens, generator=generator) < 0.5
    return (kind == FULL) | ((kind == PARTIAL) & coin)


def states_of(mask: Tensor) -> Tensor:
    some, every = any_and_all(mask, SIZE)
    return torch.where(every, FULL, torch.where(some, PARTIAL, EMPTY)).to(torch.int8)


def block_mask_of(mask: Tensor) -> BlockMask:
    states = states_of(mask)
    return block_mask_from_states(states, SIZE, len(mask), lambda b, h, q, k: mask[q, k])


def with_text_tokens(mask: Tensor, text: int) -> Tensor:
    whole = torch.ones(len(mask) + text, len(mask) + text, dtype=torch.bool)
    whole[: len(mask), : len(mask)] = mask
    return whole


@pytest.mark.parametrize("tokens", LENGTHS)
def test_states_survive_the_block_mask(tokens):
    mask = random_mask(tokens)
    assert torch.equal(dense_block_states(block_mask_of(mask))[0, 0], states_of(mask))


@pytest.mark.parametrize("batch_and_heads", [(2, 3), (1, 1)], ids=str)
def test_states_per_head(batch_and_heads):
    states = torch.randint(0, 3, (*batch_and_heads, 4, 4), dtype=torch.int8)
    mask = block_mask_from_states(states, SIZE, 60, lambda b, h, q, k: q >= k)
    assert torch.equal(dense_block_states(mask), states)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_sees_and_is_seen_by_all(tokens, text):
    mask = random_mask(tokens)
    ours = with_text(block_mask_of(mask), TokenLayout((1, 1, tokens), text))
    expected = with_text_tokens(mask, text)
    total = tokens + text
    assert torch.equal(create_mask(ours.mask_mod, 1, 1, total, total, device="cpu")[0, 0], expected)
    some, every = any_and_all(expected, SIZE)
    states = dense_block_states(ours)[0, 0]
    assert torch.equal(states != EMPTY, some)
    assert every[states == FULL].all()


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("text", TEXTS)
def test_densities(tokens, text):
    mask = random_mask(tokens)
    plan = BlockSparsePlan(TokenLayout((1, 1, tokens), text), RASTER, block_mask_of(mask))
    attended = with_text_tokens(mask, text).double().mean()
    assert plan.density == pytest.approx(float(attended))
    index = torch.arange(tokens) // SIZE
    visited = (states_of(mask) != EMPTY)[index][:, index]
    computed = with_text_tokens(visited, text).double().mean()
    assert plan.block_density == pytest.approx(float(computed))
