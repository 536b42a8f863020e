"""Results on disk: a folder for each, under a name that nobody can guess."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_accel.errors import OptionError
from dit_accel.files import write_text

RESULT_FILE = "result.json"
MAX_KEPT = 500
"""Results that can be shown again; older ones stay in the folder."""
_ID = re.compile(r"[0-9a-f]{32}")


class Store:
    """Keeps what was made in a folder, and knows which of its files may be served.

    A browser names a result and a file; both are looked up among those that this object wrote
    itself, so no path that comes from outside reaches the file system.

    Args:
        folder: where; made if it is not there.

    Raises:
        OptionError: if the folder can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"output {str(folder)!r} can't be made ({error.strerror}): name another folder."
            ) from error
        self._files: dict[str, dict[str, Path]] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def begin(self) -> tuple[str, Path]:
        """Return a fresh name and its folder."""
        name = secrets.token_hex(16)
        folder = self.folder / name
        folder.mkdir()
        return name, folder

    def keep(self, name: str, content: dict[str, Any], files: Iterable[Path]) -> None:
        """Keep a result and let its files be served.

        Args:
            name: as `begin` gave it.
            content: JSON-ready; written beside the files.
            files: in the result's folder.
        """
        folder = self.folder / name
        write_text(folder / RESULT_FILE, json.dumps(content, indent=1, allow_nan=False))
        with self._lock:
            if len(self._results) >= MAX_KEPT:
                oldest = next(iter(self._results))
                del self._results[oldest], self._files[oldest]
            self._results[name] = content
            self._files[name] = {path.relative_to(folder).as_posix(): path for path in files}

    def result(self, name: object) -> dict[str, Any] | None:
        """Return what was kept under a name."""
        return self._results.get(str(name)) if is_id(name) else None

    def file(self, name: str, file: str) -> Path | None:
        """Return one of a result's files, if it has one of that name."""
        return self._files.get(name, {}).get(file)


def is_id(name: object) -> bool:
    """Whether this could be the name of a result."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None
