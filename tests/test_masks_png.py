import pytest
from PIL import Image

from dit_accel import GNA, Radial
from dit_accel.call import TokenLayout
from dit_accel.masks_png import COLOURS, HEADER, MARGIN, save_mask_picture
from dit_accel.plan import BlockSparsePlan, DensePlan


def colour_of_block(picture, blocks, row, column):
    """The colour in the middle of a block of the first panel."""
    cell = 760 // blocks
    at = MARGIN + column * cell + cell // 2, HEADER + 40 + row * cell + cell // 2
    return picture.getpixel(at)


@pytest.mark.parametrize(
    "method", [Radial(rule="paper", block_size=16), GNA(block_size=16)], ids=str
)
@pytest.mark.parametrize("layout", [TokenLayout((5, 9, 7), 13), TokenLayout((8, 16, 16))], ids=str)
def test_colours_tell_the_states(method, layout, tmp_path):
    path = tmp_path / "mask.png"
    plan = save_mask_picture(method, layout, path)
    assert isinstance(plan, BlockSparsePlan)
    states = plan.block_mask.to_dense()[0, 0]
    blocks = len(states)
    with Image.open(path) as picture:
        for row in range(blocks):
            for column in range(blocks):
                drawn = colour_of_block(picture, blocks, row, column)
                assert (drawn == COLOURS[0]) == (not states[row, column])


def test_dense_pattern(tmp_path):
    plan = save_mask_picture(GNA(1.0), TokenLayout((2, 8, 16)), tmp_path / "mask.png")
    assert isinstance(plan, DensePlan)
    with Image.open(tmp_path / "mask.png") as picture:
        assert colour_of_block(picture, 2, 1, 0) == COLOURS[2]


def test_more_blocks_than_pixels(tmp_path):
    save_mask_picture(Radial(block_size=16), TokenLayout((8, 56, 56)), tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert max(picture.size) < 1200
