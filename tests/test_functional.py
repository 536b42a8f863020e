import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from dit_accel import GNA, Dense, Radial, SlidingWindow, attention_mask, block_mask
from dit_accel.errors import OptionError, UnknownMethodError

METHODS = [
    pytest.param(Radial(block_size=16, decay=0.3, thin_below=16), id="radial"),
    pytest.param(Radial(block_size=16, rule="paper"), id="radial-paper"),
    pytest.param(GNA((0.5, 3, 4), (1, 2, 3), block_size=16), id="gna"),
    pytest.param(SlidingWindow(3, block_size=16), id="sliding-window"),
]


@pytest.mark.parametrize("grid", [(5, 7, 6), (1, 13, 11), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("text_length", [0, 1, 37])
@pytest.mark.parametrize("method", METHODS)
def test_block_mask_is_the_attention_mask(method, grid, text_length):
    if isinstance(method, GNA) and grid[0] == 1:
        method = GNA((0.5, 3, 4), block_size=16)
    dense = attention_mask(method, grid=grid, text_length=text_length)
    blocks = block_mask(method, grid=grid, text_length=text_length)
    video = method.token_order(grid).permutation(grid)
    here = torch.cat([video, torch.arange(len(video), len(dense))])
    expected = dense[here][:, here]
    total = len(dense)

    by_token = create_mask(blocks.mask_mod, 1, 1, total, total, device="cpu")[0, 0]
    assert torch.equal(by_token, expected)

    visited = blocks.to_dense()[0, 0].bool()
    at = torch.arange(total) // 16
    assert not expected[~visited[at][:, at]].any()


def test_shapes_of_grids():
    line, image = attention_mask(GNA(2), grid=(8,)), attention_mask(GNA(2), grid=(2, 8))
    assert line.shape == (8, 8)
    assert image.shape == (16, 16)


def test_block_size_overrides():
    blocks = block_mask(Radial(), grid=(4, 16, 16), block_size=64)
    assert blocks.BLOCK_SIZE == (64, 64)
    assert blocks.to_dense().shape[-2:] == (16, 16)


def test_methods_by_name():
    assert torch.equal(attention_mask("gna", grid=(4, 5, 6)), attention_mask(GNA(), grid=(4, 5, 6)))


def test_dense_pattern_has_a_block_mask():
    assert block_mask(GNA(1.0), grid=(2, 9, 9)).to_dense().bool().all()


@pytest.mark.parametrize("function", [attention_mask, block_mask])
def test_refusals(function):
    with pytest.raises(OptionError, match="no fixed mask"):
        function(Dense(), grid=(2, 4, 4))
    with pytest.raises(UnknownMethodError, match="radial"):
        function("radail", grid=(2, 4, 4))
    with pytest.raises(OptionError, match="no token grid"):
        function("radial", grid=(2, 4, 4, 4))
    with pytest.raises(OptionError, match="text_length"):
        function("radial", grid=(2, 4, 4), text_length=-1)
    with pytest.raises(OptionError, match="axis h has 4"):
        function(GNA((1.0, 5, 4)), grid=(2, 4, 4))
