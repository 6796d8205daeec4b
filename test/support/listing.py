"""List the files of the machine that this runs on, so that two moments can be compared: JSON, path -> what is there.

``python3 listing.py /etc /usr``
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys


def described(path: str) -> str:
    """Return a file's type, mode, owner and, where it has some, its size and checksum or where it leads."""
    try:
        found = os.lstat(path)
        what = f"{stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid}"
        if stat.S_ISLNK(found.st_mode):
            return f"{what} -> {os.readlink(path)}"
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb") as stream:
                return f"{what} {found.st_size} {hashlib.sha256(stream.read()).hexdigest()}"
    except OSError as err:
        return str(err)
    return what


def listing(tops: list[str]) -> dict[str, str]:
    """Return what is below some directories: path -> description."""
    paths = (
        os.path.join(directory, name)
        for top in tops
        for directory, directories, files in os.walk(top)
        for name in directories + files
    )
    return {path: described(path) for path in paths}


if __name__ == "__main__":
    print(json.dumps(listing(sys.argv[1:])))
