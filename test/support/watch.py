"""What is done to the files of a directory of a lab's host, told by the kernel: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from lab.lablib.hosts import init_pid
from lab.lablib.topology import host

IN_ATTRIB, IN_MOVED_TO = 0x4, 0x80
_KINDS = {IN_ATTRIB: "mode or owner", IN_MOVED_TO: "moved here"}
_EVENT = struct.Struct("iIII")


class Watch:
    """Notes from now on which files are moved into a directory, and which get another mode or owner there."""

    def __init__(self, name: str, directory: str):
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(os.O_NONBLOCK)
        place = Path(f"/proc/{init_pid(host(name))}/root{directory}")
        if libc.inotify_add_watch(self._events, bytes(place), IN_ATTRIB | IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))

    def seen(self) -> list[tuple[str, str]]:
        """Return what was done since, in order: file name, what; and end."""
        data = os.read(self._events, 1 << 16)
        os.close(self._events)
        found = []
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size :][:length].rstrip(b"\0").decode()
            found.append((name, _KINDS.get(mask, hex(mask))))
            data = data[_EVENT.size + length :]
        return found
