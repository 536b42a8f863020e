"""A file of rows that many processes append to, and that survives being cut off anywhere.

One JSON object a line. A row is appended under a lock in one piece; what a killed process or a full
disk left of a line is cut off or skipped, so a row is either there as a whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import OptionError

Row = dict[str, Any]


class Journal:
    """Rows at ``path``, a ``.jsonl`` file that need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Return all whole rows, in the order in which they came."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # empty, or what a killed process left of a line
            if isinstance(row, dict):
                found.append(row)
        return found

    def append(self, rows: Iterable[Row]) -> None:
        """Append rows so that they outlast this process.

        Raises:
            OSError: if there is no room for them; none of them is kept then.
        """
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # closing gives it up, and so does dying
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                text = b"\n" + text
            try:
                while text:
                    text = text[os.write(handle, text) :]
                os.fsync(handle)
            except OSError as error:
                os.ftruncate(handle, size)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(handle)


def refuse_other(
    path: Path, earlier: Mapping[str, Any], wanted: Mapping[str, Any], kinds: str = "name"
) -> None:
    """Raise `OptionError` if a file to go on with was made with settings other than these.

    Args:
        path: the file or folder.
        earlier: its settings.
        wanted: what they have to be; further ones in ``earlier`` don't matter.
        kinds: what a user can give another of.
    """
    different = [name for name, value in wanted.items() if earlier.get(name) != value]
    if different:
        raise OptionError(
            f"output {str(path)!r} was made with another {', '.join(different)}: give another "
            f"{kinds}, or --force to start it again."
        )


def as_read_back(value: Any) -> Any:
    """Return a JSON-ready value as a file gives it back: tuples are lists there."""
    return json.loads(json.dumps(value))
