"""Every command that the README and the manuals show for operators runs on the lab as it stands there."""

from __future__ import annotations

import re
import shlex

import pytest

from support import lab

README = (lab.REPOSITORY / "README.md").read_text()
MANUALS = [README, *(path.read_text() for path in sorted(lab.REPOSITORY.glob("docs/*.md")))]
PATTERN = r"`((?:salt|salt-call|salt-run|nft|journalctl|openssl) [^`]+)`"
COMMANDS = list(dict.fromkeys(command for text in MANUALS for command in re.findall(PATTERN, text)))
#: test_clean, test_highstate and test_lifecycle run these, and more of them.
ELSEWHERE = {
    "salt mx1 state.apply mailfw.clean",
    "salt-call state.apply mailfw.reactor",
    "salt-call state.apply mailfw.reactor.clean",
    'salt mx1 mailfw.open 2h reason="ticket 17"',
    'salt-run mailfw.open 2h "nobody can log in"',
    "salt-run mailfw.close",
}


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays(fleet):
    """What the commands did ends: the addresses are clients of the lab."""
    yield
    for address in ("203.0.113.10", "198.51.100.7"):
        for verb in ("unblock", "clear"):
            lab.run("master", "salt-run", f"mailfw.{verb}", address)


def test_the_commands_are_found():
    assert len(COMMANDS) > 15
    assert set(COMMANDS) >= ELSEWHERE


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_command(fleet, command):
    host = "master" if command.startswith(("salt ", "salt-run ")) else "mx1"
    done = lab.lab("exec", host, "--", *shlex.split(command), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_make_is_the_way_in():
    assert lab.lab("help").returncode == 0
    makefile = (lab.REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", README, re.M):
        assert f"\n{target}:" in makefile
