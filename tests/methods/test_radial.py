import math

import pytest
import torch
from mask_vectors import any_and_all, digest, mask_vectors
from torch import Tensor

from dit_accel import Radial
from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.functional import attention_mask, block_mask
from dit_accel.grid import RASTER, TokenOrder
from dit_accel.plan import EMPTY, FULL

RELEASED = mask_vectors("radial", "R")
PAPER = mask_vectors("radial", "P")


def states_of(method: Radial, grid: tuple[int, int, int], text_length: int = 0) -> Tensor:
    return method.tile_states(TokenLayout(grid, text_length), RASTER)


def literal_band(layout: TokenLayout, method: Radial, sink: bool) -> Tensor:
    """The released rule before it goes to blocks, token by token, with its band trimmed."""
    frame = layout.grid[1] * layout.grid[2]
    index = torch.arange(layout.video_length)
    position, of_frame = index % frame, index // frame
    gap = (position[:, None] - position).abs()
    distance = (of_frame[:, None] - of_frame).abs()
    bits = torch.tensor([int(d).bit_length() for d in range(layout.grid[0])])[distance]
    band = 2.0 ** frame.bit_length() / 2.0**bits
    split = (method.thin_below / band).floor().clamp(min=1)
    width = (band * method.decay).clamp(min=method.block_size).floor()
    trim = math.floor(2.5 * math.floor(method.block_size / 3))
    near = (distance <= 1) | (gap <= width - trim)
    mask = near & (distance % split == 0)
    return mask | (of_frame == 0) if sink else mask


@pytest.mark.parametrize(("entry", "mask"), RELEASED)
def test_released_block_masks(entry, mask):
    frames, tokens, block = entry["frames"], entry["tokens_per_frame"], entry["block"]
    method = Radial(decay=entry["decay"], sink=entry["model"] == "wan", block_size=block)
    if block == 1:
        assert torch.equal(attention_mask(method, grid=(frames, 1, tokens)), mask)
        return
    ours = block_mask(method, grid=(frames, 1, tokens), text_length=entry.get("text_tokens", 0))
    assert torch.equal(ours.to_dense()[0, 0].bool(), mask)


@pytest.mark.parametrize(
    ("method", "frames", "text_length", "sha256"),
    [
        pytest.param(
            Radial(decay=0.95, sink=False),
            30,
            256,
            "352dc95c68911b99d5d6c1b101c95da42c80ef2553298004826586d98505f75d",
            id="R12-hunyuan",
        ),
        pytest.param(
            Radial(decay=0.8, sink=True, block_size=64),
            20,
            0,
            "6543e696a16443f57eeb9d8aa84d3069c275c8cd13d0bcf34949b7c3421e9474",
            id="R13-wan2.2",
        ),
    ],
)
def test_released_block_masks_by_digest(method, frames, text_length, sha256):
    ours = block_mask(method, grid=(frames, 48, 80), text_length=text_length)
    assert digest(ours.to_dense()[0, 0].bool()) == sha256


@pytest.mark.parametrize(("entry", "mask"), PAPER)
def test_paper_equation_4(entry, mask):
    method = Radial(rule="paper", sink=entry["sink"])
    grid = (entry["frames"], 1, entry["tokens_per_frame"])
    assert torch.equal(attention_mask(method, grid=grid), mask)


def test_one_mask_in_all_forms():
    """What `attention_mask` shows is what the blocks compute."""
    method = Radial(decay=0.5, block_size=16, thin_below=16)
    layout = TokenLayout((7, 5, 9), 13)
    on = states_of(method, layout.grid, 13) == FULL
    index = torch.arange(layout.video_length) // 16
    mask = method.attention_mask(layout)
    assert torch.equal(mask[: len(index), : len(index)], on[index][:, index])
    assert mask[len(index) :].all()
    assert mask[:, len(index) :].all()


@pytest.mark.parametrize("grid", [(1, 13, 11), (13, 7, 9), (21, 5, 6), (6, 8, 8)], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("sink", [True, False])
def test_ragged_frames_keep_any_block_that_the_band_touches(grid, block_size, decay, sink):
    method = Radial(decay=decay, sink=sink, block_size=block_size, thin_below=16)
    expected, _ = any_and_all(literal_band(TokenLayout(grid), method, sink), block_size)
    assert torch.equal(states_of(method, grid) == FULL, expected)


@pytest.mark.parametrize("grid", [(1, 13, 11), (13, 7, 9), (21, 5, 6)], ids=str)
@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_paper_rule_states_are_exact(grid, decay):
    method = Radial(rule="paper", decay=decay, block_size=16)
    some, every = any_and_all(method.attention_mask(TokenLayout(grid)), 16)
    states = states_of(method, grid)
    assert torch.equal(states == EMPTY, ~some)
    assert torch.equal(states == FULL, every)


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52)], ids=["720p", "480p"])
@pytest.mark.parametrize("sink", [True, False])
def test_81_frames(grid, sink):
    """The released code can't do these sizes: 3600 and 1560 tokens are no whole blocks."""
    frames, frame = grid[0], grid[1] * grid[2]
    on = states_of(Radial(decay=0.2, sink=sink), grid) == FULL
    assert on.any(1).all()
    block = torch.arange(frames * frame) // 128
    for i in (0, 1, 9, frames - 1):
        for j in range(frames):
            rows, columns = (block[x * frame : (x + 1) * frame] for x in (i, j))
            if abs(i - j) <= 1 or (sink and j == 0):
                assert on[rows.unique()][:, columns.unique()].all()
            elif frame > 2048 or abs(i - j) < 16 or abs(i - j) % 2 == 0:
                # Everybody sees their own position, at the borders of frames as in the middle.
                assert on[rows, columns].all()


def test_sink_is_for_sequences_without_text():
    grid, method = (6, 16, 16), Radial()
    assert torch.equal(states_of(method, grid), states_of(Radial(sink=True), grid))
    assert torch.equal(states_of(method, grid, 128), states_of(Radial(sink=False), grid, 128))


def test_thin_below():
    """The released rule drops even neighbours of frames of under 128 tokens."""
    released = attention_mask(Radial(block_size=1, sink=False), grid=(4, 8, 8))
    thinned_less = attention_mask(Radial(block_size=1, sink=False, thin_below=8), grid=(4, 8, 8))
    assert not released[0, 64:128].any()
    assert thinned_less[0, 64:128].all()


def test_infinite_decay_is_dense():
    assert attention_mask(Radial(decay=math.inf), grid=(40, 8, 8)).all()
    assert attention_mask(Radial(decay=math.inf, rule="paper"), grid=(40, 2, 3)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": -0.1}, "decay"),
        ({"decay": math.nan}, "decay"),
        ({"rule": "relased"}, "rule"),
        ({"block_size": 96}, "power of two"),
        ({"thin_below": 0}, "thin_below"),
    ],
    ids=["decay", "nan", "rule", "block_size", "thin_below"],
)
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        Radial(**options)


def test_needs_raster_order():
    with pytest.raises(OptionError, match="raster"):
        Radial().tile_states(TokenLayout((4, 16, 16)), TokenOrder((2, 8, 8)))
