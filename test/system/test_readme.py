"""Every command that the README and the manuals show for operators runs on the lab as it stands there."""

from __future__ import annotations

import re
import shlex

import pytest

from support import lab

README = (lab.REPOSITORY / "README.md").read_text()
MANUALS = [README, *(path.read_text() for path in sorted(lab.REPOSITORY.glob("docs/*.md")))]
#: A block of commands, or a command in backticks.
SHOWN = r"^```bash\n(.*?)^```$|`((?:salt|salt-call|salt-run|nft|journalctl|systemctl|mailfw-open|openssl) [^`]+)`"
COMMANDS = list(
    dict.fromkeys(
        command
        for text in MANUALS
        for block, single in re.findall(SHOWN, text, re.M | re.S)
        for command in block.splitlines() or [single]
        if not command.startswith("make ")
    )
)
#: Commands that are not run here -> the file that runs them, and how they are called there.
ELSEWHERE = {
    "spm build .": ("test/system/test_packaging.py", '"build"'),
    "spm local install /srv/spm_build/mailfw-0.1.0-1.spm": ("test/system/test_packaging.py", '"local", "install"'),
    "salt-call state.apply mailfw.reactor": ("test/support/lab.py", 'configure_master(sls: str = "mailfw.reactor")'),
    "salt-call state.apply mailfw.reactor.clean": (
        "test/system/test_clean.py",
        'configure_master("mailfw.reactor.clean")',
    ),
    "salt mx1 state.apply mailfw.clean": ("test/system/test_clean.py", '"state.apply", "mailfw.clean"'),
    'salt mx1 mailfw.open 2h reason="ticket 17"': ("test/system/test_lifecycle.py", '"mailfw.open", "1h", "reason='),
    'salt-run mailfw.open 2h "nobody can log in"': (
        "test/system/test_lifecycle.py",
        '"salt-run", "mailfw.open", "2h", "nobody can log in"',
    ),
    "salt-run mailfw.close": ("test/system/test_lifecycle.py", '"salt-run", "mailfw.close"'),
    "systemctl stop mailfw": ("test/system/test_lifecycle.py", '"systemctl", "stop", "mailfw"'),
}
#: They have nothing to say when all is well.
SILENT = ("systemctl start ", "systemctl restart ", "systemctl reload ")


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays(fleet):
    """What the commands did ends: the addresses are clients of the lab."""
    yield
    lab.run("mx1", "mailfw-open", "close")
    for address in ("203.0.113.10", "198.51.100.7"):
        for verb in ("unblock", "clear"):
            lab.run("master", "salt-run", f"mailfw.{verb}", address)


def test_the_commands_are_found():
    assert len(COMMANDS) > 40
    assert set(COMMANDS) >= ELSEWHERE.keys()


@pytest.mark.parametrize("command", ELSEWHERE)
def test_command_is_run_elsewhere(command):
    path, called = ELSEWHERE[command]
    assert called in (lab.REPOSITORY / path).read_text()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_command(fleet, command):
    host = "master" if command.startswith(("salt ", "salt-run ")) else "mx1"
    done = lab.lab("exec", host, "--", *shlex.split(command), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() or command.startswith(SILENT)
    assert "No entries" not in done.stdout


def test_make_is_the_way_in():
    assert lab.lab("help").returncode == 0
    makefile = (lab.REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)[`\n]", "".join(MANUALS), re.M):
        assert f"\n{target}:" in makefile
