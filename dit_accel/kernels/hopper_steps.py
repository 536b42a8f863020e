"""The steps of the kernel for Hopper: which key tiles a program visits, and what it hides in them.

A program's steps are, in this order: its partial tiles, a ragged last tile, the rest of the text
that fills no tile, each with a mask; and then, without, whole tiles of text and full tiles. A text
query visits every tile.
"""

# Gluon's functions take tensors, pointers and constants under the same names: types say little.
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = gl.constexpr(128)
"""Queries per program and keys per step; the lists' block size must be the same."""

ROWS = gl.constexpr(64)
"""Query rows of one group of warps."""


@gluon.jit
def program_work(program, lists, sizes):
    """What one program does: ``(b, h, first row, end of rows)`` and its steps.

    Steps below ``partials`` are partial tiles, then come ``ragged`` (0 or 1) ragged last tiles;
    from ``masked`` to ``steps`` nothing is hidden. Text queries go first: they take the longest.
    """
    full_count, full_index, partial_count, _partial_index, _partial_slot, _bits = lists
    (num_heads, num_video, num_text, video_start, text_start, programs,
     list_sb, list_sh, full_columns, _partial_columns) = sizes  # fmt: skip
    video_tiles = gl.cdiv(num_video, TILE)
    text_tiles = gl.cdiv(num_text, TILE)
    text_programs = programs // (video_tiles + text_tiles) * text_tiles
    is_text = program < text_programs
    program = gl.where(is_text, program, program - text_programs)
    tiles = gl.where(is_text, text_tiles, video_tiles)
    tile = program % tiles
    b = program // tiles // num_heads
    h = program // tiles % num_heads
    first = gl.where(is_text, text_start, video_start) + tile * TILE
    end = gl.where(is_text, text_start + num_text, video_start + num_video)
    row = gl.where(is_text, 0, b.to(gl.int64) * list_sb + h.to(gl.int64) * list_sh + tile)
    listed = gl.where(is_text, video_tiles, gl.load(full_count + row))
    partials = gl.where(is_text, 0, gl.load(partial_count + row))
    # The list is ascending, so a ragged last tile can only be its last entry.
    last = full_index + row * full_columns + listed - 1
    last = gl.load(last, mask=(listed > 0) & (is_text == 0), other=-1)
    last = gl.where(is_text, video_tiles - 1, last)
    ragged = ((last == video_tiles - 1) & (num_video % TILE != 0)).to(gl.int32)
    masked = partials + ragged + gl.where(num_text % TILE != 0, 1, 0)
    steps = masked + num_text // TILE + listed - ragged
    return b, h, first, end, is_text, row, partials, ragged, masked, steps


@gluon.jit
def key_row(step, work, lists, sizes):
    """First key row of a step."""
    _full_count, full_index, _partial_count, partial_index, _partial_slot, _bits = lists
    (_num_heads, num_video, num_text, video_start, text_start, _programs,
     _list_sb, _list_sh, full_columns, partial_columns) = sizes  # fmt: skip
    _b, _h, _first, _end, is_text, row, partials, ragged, masked, steps = work
    whole_text = num_text // TILE
    is_partial = step < partials
    is_ragged = (step >= partials) & (step < partials + ragged)
    is_text_tile = (step >= partials + ragged) & (step < masked + whole_text)
    entry = step - masked - whole_text
    partial = gl.load(partial_index + row * partial_columns + step, mask=is_partial, other=0)
    full = full_index + row * full_columns + entry
    full = gl.load(full, mask=(entry >= 0) & (step < steps) & (is_text == 0), other=0)
    tile = gl.where(is_partial, partial, gl.where(is_text, entry, full))
    tile = gl.where(is_ragged, num_video // TILE, tile)
    text_tile = gl.where(step < masked, whole_text, step - masked)
    tile = gl.where(is_text_tile, text_tile, tile)
    return gl.where(is_text_tile, text_start, video_start) + tile * TILE


@gluon.jit
def mask_words(
    me: gl.constexpr, step, work, lists, sizes, by_word: gl.constexpr
):  # fmt: skip
    """Which keys of a step each row may see: int32 ``[ROWS, TILE / 32]``, bits as in `tiles.py`."""
    _full_count, _full_index, _partial_count, _partial_index, partial_slot, bits = lists
    num_video, num_text = sizes[1], sizes[2]
    _b, _h, _first, _end, _is_text, row, partials, ragged, masked, _steps = work
    partial_columns = sizes[9]
    layout: gl.constexpr = gl.SliceLayout(2, by_word)
    rows = me * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    words = gl.arange(0, TILE // 32, layout=gl.SliceLayout(0, layout))
    is_partial = step < partials
    slot = gl.load(partial_slot + row * partial_columns + step, mask=is_partial, other=0)
    pattern = bits + slot.to(gl.int64) * (TILE * TILE // 32)
    stored = gl.load(pattern + (rows * (TILE // 32))[:, None] + words[None, :])
    # Elsewhere the first keys are visible: all of a full tile.
    rest = step - partials
    visible = gl.where(rest < ragged, num_video % TILE, num_text % TILE)
    visible = gl.where(step < masked, visible, TILE)
    in_word = gl.minimum(gl.maximum(visible - words * 32, 0), 32)
    leading = gl.where(in_word == 32, -1, (1 << in_word) - 1)
    select = 0 - is_partial.to(gl.int32)
    return (stored & select) | (leading & ~select)[None, :]
