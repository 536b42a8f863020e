"""What a transformer call that is under way told its attention layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dit_accel.call import TokenLayout
from dit_accel.grid import TokenOrder, check_tokens
from dit_accel.methods.base import AttentionMethod
from dit_accel.parallel.split import Split
from dit_accel.session import ResolutionSession
from dit_accel.tracking import Moment


@dataclass(frozen=True)
class RunningForward:
    """One transformer call."""

    layouts: tuple[TokenLayout, ...]
    method: AttentionMethod  # with its options set for these tokens
    moment: Moment
    num_layers: int
    mask_explained: bool
    wanted: TokenOrder  # in which the method wants the video tokens
    order: TokenOrder  # in which they are
    dense_step: bool  # none of its layers is sparse
    transformer: int  # its id
    resolution: ResolutionSession | None = None  # whose method it is, if one has its own here
    sample: int = 0  # of the batch, where samples run one by one
    split: Split | None = None  # how its tokens are spread over ranks

    @property
    def regime(self) -> tuple[TokenOrder, bool]:
        """See `Forward.regime`."""
        return self.order, self.dense_step

    @property
    def image_layout(self) -> TokenLayout:
        """The layout of layers that see the video (or image) alone."""
        return replace(self.layouts[0], text_length=0)

    def layout_of(self, rows: int, layout: TokenLayout) -> TokenLayout:
        """Return ``layout``, without its text where a layer of so many rows sees the video alone.

        Raises:
            GridMismatchError: if the rows are neither.
        """
        if rows == layout.video_length and layout.text_length:
            return replace(layout, text_length=0)
        if len(self.layouts) == 1:
            check_tokens(rows, layout.grid, layout.text_length)
        return layout
