"""Writing files so that whoever reads them, or a power failure, finds the old or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Optional


def replace(path: Path, text: str, mode: int = 0o600, owner: str = "root") -> None:
    """Make a file say ``text``, at once; its directory is made if it is missing. Raises OSError, LookupError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _clear_up(path)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if fresh.owner() != owner:  # Who has no right to give files away need not ask for it.
            shutil.chown(fresh, owner)
        fresh.replace(path)
    except BaseException as err:
        fresh.unlink(missing_ok=True)
        if isinstance(err, OSError):
            err.filename = str(path)  # Of a full disk, write(2) does not tell which.
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def modified(path: Path) -> Optional[float]:
    """Return when a file was written last, in Unix time; None when there is none, or it cannot be looked at."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _clear_up(path: Path) -> None:
    """Remove what writers of a file have left that were killed."""
    for left in path.parent.glob(f"{path.name}.*.new"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(left.name[len(path.name) + 1 : -len(".new")]), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)
