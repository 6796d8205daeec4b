"""Writing files so that whoever reads them, or a power failure, finds the old or the new one, whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace(path: Path, text: str, mode: int = 0o600, owner: str = "root") -> None:
    """Make a file say ``text``, at once; its directory is made if it is missing. Raises OSError, LookupError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        shutil.chown(fresh, owner)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
