"""The demo shows every mode on both hosts, a login, a ban and a mode switch; it fails when anything is not as said."""

from __future__ import annotations

import subprocess
import sys

from support import lab


def test_demo(fleet):
    demo = subprocess.run(
        [sys.executable, lab.REPOSITORY / "test/lab/demo.py"], capture_output=True, text=True, timeout=600
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "BAD" not in demo.stdout
