"""Access to the kernel's packet filter: the ``nft`` command, and libnftables in-process for the login path.

Both take the same scripts. Starting ``nft`` costs about 15 ms; a login's elements through the library 0.15 ms.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import subprocess
from typing import IO

TABLE = "inet mailfw"

#: nft can hang only on a kernel that does not answer; no caller waits longer than this many seconds for it.
TIMEOUT = 120

_CLOSE_ON_EXEC, _NEVER_EXECUTED = 1, 8  # <linux/memfd.h>


class NftError(RuntimeError):
    """nft refused a script; the message is nft's own."""

    def __init__(self, message: str):
        #: ENFILE is what the kernel says of an element that does not fit (nf_tables_api.c, nft_add_set_elem).
        self.full = os.strerror(errno.ENFILE) in message
        super().__init__(message + ("\nA set is full: see mailfw:sizes." if self.full else ""))


class NftKilledError(NftError):
    """nft was killed, which says nothing about the script; it has happened, all of it, or has not."""


def command(*arguments: str, script: str | None = None) -> str:
    """Run ``nft`` with ``arguments``, and with ``script`` on its standard input; return what it printed.

    Raises NftError with nft's message when it fails or is not installed.
    """
    return _run(["nft", *arguments], script)


def run(script: str) -> None:
    """Run a script as one transaction: all of it happens, or nothing does. Raises NftError."""
    command("-f", "-", script=script)


def table() -> str:
    """Return the loaded table as nft lists it, without elements; empty when there is none. Raises NftError.

    Of the whole ruleset, since nft 1.0.6 reads every element before it lists a single table: a minute for a million.
    """
    listing = command("-s", "-t", "list", "ruleset", TABLE.split()[0])
    found = re.search(rf"^table {TABLE} \{{.*?^\}}$", listing, re.M | re.S)
    return found[0] if found else ""


def counters() -> dict[str, int]:
    """Return the packets of each decision: name -> all services and families together. Raises NftError."""
    return decisions(command("-j", "-t", "list", "ruleset", TABLE.split()[0]))


def decisions(listing: str) -> dict[str, int]:
    """Return the same of what nft lists as JSON. A decision without a counter of its own has those of its services."""
    own: dict[str, int] = {}
    of_services: dict[str, int] = {}
    for entry in json.loads(listing)["nftables"]:
        counter = entry.get("counter")
        if counter and counter["table"] == TABLE.split()[1]:
            decision, _, service = counter["name"].partition("/")
            counts = of_services if service else own
            counts[decision] = counts.get(decision, 0) + counter["packets"]
    return {**of_services, **own}


def _run(command_line: list[str], script: str | None) -> str:
    try:
        with _in_memory(script or "") as stdin:
            # What a caller lets its children inherit is kept open: the lock is held as long as nft works.
            done = subprocess.run(
                command_line,
                stdin=stdin,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
                close_fds=False,
            )
    except FileNotFoundError as err:
        raise NftError(f"{err.filename}: not installed") from err
    except subprocess.TimeoutExpired as err:
        raise NftError(f"{' '.join(command_line)}: no answer within {TIMEOUT} s") from err
    if done.returncode < 0:
        raise NftKilledError(f"{' '.join(command_line)}: killed by signal {-done.returncode}")
    if done.returncode:
        raise NftError(done.stderr.strip() or f"{' '.join(command_line)}: exit status {done.returncode}")
    return done.stdout


def _in_memory(text: str) -> IO[str]:
    """Return a file without a disk. Of a pipe, nft would take a part for the whole if this process were killed."""
    # os.memfd_create is missing where Python was built for old systems.
    memfd_create = ctypes.CDLL(None, use_errno=True).memfd_create
    descriptor = memfd_create(b"nft", _CLOSE_ON_EXEC | _NEVER_EXECUTED)
    if descriptor < 0:  # Linux before 6.3
        descriptor = memfd_create(b"nft", _CLOSE_ON_EXEC)
    if descriptor < 0:
        raise NftError(f"memfd_create: {os.strerror(ctypes.get_errno())}")
    stream = open(descriptor, "w+", encoding="utf-8")  # noqa: SIM115
    stream.write(text)
    stream.seek(0)
    return stream


def in_scratch_namespace(script: str, *listings: str) -> str:
    """Load a script into a network namespace of its own that vanishes afterwards; return what ``listings`` print.

    Each listing is one nft command such as ``-s list table inet mailfw``. This machine's ruleset is not touched.
    Raises NftError with nft's message when the script does not load.
    """
    lines = ["nft -f - || exit 1"] + [f"nft {listing}" for listing in listings]
    return _run(["unshare", "-n", "sh", "-c", "\n".join(lines)], script)


class Library:
    """libnftables in this process. One object serves one thread."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libnftables.so.1")
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        self._lib.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
            getattr(self._lib, name).argtypes = [ctypes.c_void_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(self._lib, name).argtypes = [ctypes.c_void_p]
            getattr(self._lib, name).restype = ctypes.c_char_p
        self._lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._context = self._lib.nft_ctx_new(0)
        self._lib.nft_ctx_buffer_output(self._context)
        self._lib.nft_ctx_buffer_error(self._context)

    def run(self, script: str) -> None:
        """Run a script as one transaction. Raises NftError with nft's message."""
        failed = self._lib.nft_run_cmd_from_buffer(self._context, script.encode())
        message = self._lib.nft_ctx_get_error_buffer(self._context) or b""
        self._lib.nft_ctx_get_output_buffer(self._context)
        if failed:
            raise NftError(message.decode(errors="replace").strip() or "libnftables failed without a message")
