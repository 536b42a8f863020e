"""Rows are there as a whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from dit_accel.errors import OptionError
from dit_accel.journal import Journal, refuse_other


def test_rows_come_back_in_order(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    assert journal.rows() == []
    journal.append([{"a": 1}, {"a": 2}])
    Journal(journal.path).append([{"a": 3}])
    assert [row["a"] for row in journal.rows()] == [1, 2, 3]


@pytest.mark.parametrize(
    "torn", ['{"a": 2, "b', '{"a": 2}', "\x00\x00"], ids=["half", "end", "zero"]
)
def test_a_torn_line_spoils_no_other(tmp_path, torn):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append([{"a": 1}])
    with journal.path.open("a") as file:
        file.write(torn)
    journal.append([{"a": 3}])
    assert [row["a"] for row in journal.rows() if row["a"] != 2] == [1, 3]


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append([{"a": 1}])
    before = journal.path.read_bytes()
    write = os.write

    def no_room(handle: int, text: bytes) -> int:
        write(handle, text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", no_room)
    with pytest.raises(OSError, match=r"No space left on device.*rows\.jsonl"):
        journal.append([{"a": 2}])
    monkeypatch.undo()
    assert journal.path.read_bytes() == before


def test_other_settings_are_named(tmp_path):
    refuse_other(tmp_path, {"a": 1, "b": 2}, {"a": 1})
    with pytest.raises(OptionError, match="another a, c: give another folder"):
        refuse_other(tmp_path, {"a": 1}, {"a": 2, "c": 3}, "folder")
