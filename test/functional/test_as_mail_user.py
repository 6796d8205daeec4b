"""A host's post-login script runs as the mail user after mailfw's hook, and never as root, under each /bin/sh."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "mailfw/dovecot/files/as-mail-user"
#: Of Debian, and of Red Hat's family. bash has variables UID and GROUPS of its own.
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]
WHO = 'echo "$(id -u) $(id -g) $(id -G)"'


@pytest.fixture(params=SHELLS)
def run(request):
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")

    def as_mail_user(uid: str, gid: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["env", "-i", *(f"{key}={value}" for key, value in environment.items())]
        command += [request.param, str(SCRIPT), uid, gid, "sh", "-c", WHO]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    return as_mail_user


@pytest.mark.parametrize(
    ("settings", "environment", "who"),
    [
        (("-", "-"), {"UID": "5000", "GID": "5001"}, "5000 5001 5001"),
        (("games", "mail"), {"UID": "5000", "GID": "5001"}, "5000 5001 5001"),
        (("games", "mail"), {}, "5 8 8"),
        (("games", "-"), {}, "5 60 60"),
        (("-", "-"), {"UID": "5", "GID": "60", "SYSTEM_GROUPS_USER": "mail"}, "5 60 60 8"),
        (("1234", "4321"), {}, "1234 4321 4321"),
    ],
    ids=str,
)
def test_dovecots_user_database_counts_then_its_settings(run, settings, environment, who) -> None:
    done = run(*settings, **environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, who, "")


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (("-", "-"), {}),
        (("-", "8"), {"GID": "8"}),
        (("root", "mail"), {}),
        (("-", "-"), {"UID": "0", "GID": "8"}),
        (("-", "-"), {"UID": "000", "GID": "8"}),
        (("there-is-no-such-user", "8"), {}),
        (("1234", "-"), {}),
        (("-", "-"), {"UID": "--help", "GID": "8"}),
    ],
    ids=str,
)
def test_the_script_does_not_run_as_root_or_as_nobody_in_particular(run, settings, environment) -> None:
    done = run(*settings, **environment)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr
