"""mailfw.doctor's checks of a host, each broken once on a real kernel; what to do is done where it is a command."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import client, doctor, doctor_mail, kernel_settings, ruleset
from support.agent import KEY, LOGIN_USER, Agent
from support.firewall import Firewall, rule_files
from support.net import Client, Host, until

#: Those that ask Dovecot and Postfix, of which this machine may have some: they are looked at in the lab.
OF_MAIL_SERVERS = {
    doctor_mail.dovecot_runs_the_hook,
    doctor_mail.dovecot_has_read_its_configuration,
    doctor_mail.dovecot_reports_logins,
    doctor_mail.dovecot_believes_few_hosts,
    doctor_mail.proxies_are_let_in,
    doctor_mail.port_25_offers_no_login,
}
CHECKS = [check for check in (*doctor.CHECKS, *doctor_mail.CHECKS) if check not in OF_MAIL_SERVERS]
PILLAR: dict[str, Any] = {"fleet": {"keys": [KEY]}, "sizes": {"blocked": 1}}


class Patient:
    """The mail host, and what the doctor says of it."""

    def __init__(self, host: Host, firewall: Firewall, agent: Agent):
        self.host, self.firewall, self.agent = host, firewall, agent

    def doctor(self, **more: Any) -> dict[str, Any]:
        found = {**self.firewall.settings, "host": {"login_users": [LOGIN_USER]}}
        known = doctor.Host(**{"saved": found, "pillar": self.firewall.settings, **more})
        return self.host.call(doctor.examine, known, CHECKS)

    def failed(self, **more: Any) -> dict[str, dict[str, str]]:
        return self.doctor(**more)["failed"]

    def mended(self, do: str) -> bool:
        """Do what the doctor says; return whether all is well then."""
        (command,) = re.findall(r"`(.*?)`", do)
        self.host.run("sh", "-c", command)
        return not self.failed()

    def load(self, pillar: dict[str, Any]) -> None:
        """Load the rules of a pillar from files, as the states do, and give the agent its settings."""
        self.firewall.script(**pillar)
        self.host.call(ruleset.install, rule_files(self.firewall.settings))
        self.agent.configure(pillar)


@pytest.fixture
def patient(host: Host, firewall: Firewall, alice: Client, tmp_path: Path) -> Iterator[Patient]:
    """A host where all is well."""
    firewall.load(**PILLAR)
    with closing(Agent(host, tmp_path, PILLAR)) as agent:
        host.run("chgrp", "nogroup", client.SOCKET)
        host.run("chmod", "660", client.SOCKET)
        made = Patient(host, firewall, agent)
        made.load(PILLAR)
        agent.status()
        yield made
    host.run("sh", "-c", f"rm -f {ruleset.RULES}/*")


def test_a_host_in_order_is_well(patient: Patient) -> None:
    found = patient.doctor()
    assert found["failed"] == {}
    assert {"rules are loaded", "agent is current", "dovecot can tell the agent", "sets have room"} <= {*found["ok"]}
    assert found["skipped"]["units are enabled"] == "there is no systemd here"


def test_looking_changes_nothing(patient: Patient) -> None:
    before = patient.firewall.ruleset(), patient.agent.status()["logins"], patient.agent.events()
    patient.doctor()
    assert (patient.firewall.ruleset(), patient.agent.status()["logins"], patient.agent.events()) == before


def test_a_host_without_mailfw_is_told_to_apply_it(host: Host, firewall: Firewall) -> None:
    found = host.call(doctor.examine, doctor.Host(None, firewall.settings), CHECKS)
    assert found["failed"].keys() == {"what pillar says is applied"}
    assert found["failed"]["what pillar says is applied"]["do"] == doctor.APPLY
    assert found["skipped"]["agent answers"] == "mailfw is not applied here"


#: Somebody's rules, the check that fails, and what is said of them.
NEIGHBOURS = {
    "a drop": (
        "table inet filter { chain input { type filter hook input priority 0; policy accept;\n"
        " tcp dport 993 drop\n }\n }",
        "other tables let mail pass",
        "drops imaps (993)",
    ),
    "a mark": (
        "table inet other { chain input { type filter hook prerouting priority 0;\n ct mark set 0x1\n }\n }",
        "nobody changes the mark",
        "changes bits 0x03000000",
    ),
    "no tracking": (
        "table inet raw { chain pre { type filter hook prerouting priority raw;\n tcp dport 993 notrack\n }\n }",
        "connections are tracked",
        "keeps what clients send to imaps (993)",
    ),
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_neighbours(patient: Patient, kind: str) -> None:
    script, name, words = NEIGHBOURS[kind]
    patient.firewall.run(script)
    failed = patient.failed()
    assert failed.keys() == {name}
    assert words in failed[name]["found"]


def test_what_a_neighbour_may_do_or_does_to_services_that_nobody_offers_is_fine(patient: Patient) -> None:
    patient.load({**PILLAR, "services": {"pop3": {"port": 1110}}})
    patient.firewall.run(
        "table inet f2b { set addresses { type ipv4_addr\n elements = { 203.0.113.10 }\n }\n"
        " chain input { type filter hook input priority -1;\n tcp dport 993 ip saddr @addresses reject\n"
        " tcp dport { 22, 1110 } drop\n }\n }"
    )
    assert patient.failed() == {}


def write(host: Host, path: Path, text: str) -> None:
    host.call(path.write_text, text)


def test_rule_files_that_do_not_load(patient: Patient) -> None:
    write(patient.host, ruleset.RULES / "zz.nft", "add rule inet mailfw guarded meta nonsense 1\n")
    found = patient.doctor()
    assert found["failed"].keys() == {"kernel takes the rules"}
    assert "nonsense" in found["failed"]["kernel takes the rules"]["found"]
    assert "rules are loaded" in found["skipped"]


def test_rules_that_differ_from_their_files(patient: Patient) -> None:
    write(patient.host, ruleset.RULES / "zz.nft", "add counter inet mailfw extra\n")
    failed = patient.failed()
    assert failed.keys() == {"rules are loaded"}
    assert "counter extra" in failed["rules are loaded"]["found"]
    assert patient.mended(failed["rules are loaded"]["do"])


def test_rules_that_are_not_loaded(patient: Patient) -> None:
    patient.agent.stop()  # It would repair this.
    patient.firewall.run("delete table inet mailfw")
    failed = patient.failed()
    assert failed.keys() == {"rules are loaded", "agent answers"}
    assert "not loaded" in failed["rules are loaded"]["found"]
    patient.agent.start()
    assert patient.mended(failed["rules are loaded"]["do"])


def test_a_host_that_is_open_for_everyone(patient: Patient) -> None:
    patient.host.run("/usr/lib/mailfw/mailfw-open", "2h", "ticket 17")
    failed = patient.failed()
    assert failed.keys() == {"rules are in force"}
    assert "ticket 17" in failed["rules are in force"]["found"]
    assert failed["rules are in force"]["do"] == "run `mailfw-open close`"
    assert patient.mended("`/usr/lib/mailfw/mailfw-open close`")


def test_a_full_set(patient: Patient) -> None:
    patient.firewall.block("203.0.113.10")
    failed = patient.failed()
    assert failed["sets have room"]["found"] == "full: blocked_ipv4"
    assert "mailfw:sizes:blocked" in failed["sets have room"]["do"]
    assert failed.keys() == {"sets have room"}
    assert patient.firewall.elements("blocked_ipv4").keys() == {"203.0.113.10"}


def test_tcp_fast_open(patient: Patient) -> None:
    write(patient.host, kernel_settings.FASTOPEN, "3")
    try:
        failed = patient.failed()
        assert failed.keys() == {"tcp fast open is off"}
        assert patient.mended(failed["tcp fast open is off"]["do"])
    finally:
        write(patient.host, kernel_settings.FASTOPEN, "1")


@pytest.fixture
def instead(host: Host) -> Iterator[Callable[[str, str], None]]:
    """Have a file of the host be another one for a while, wherever it is."""
    mounted: list[str] = []

    def put(path: str, text: str) -> None:
        other = Path("/run") / Path(path).name
        host.call(other.write_text, text)
        host.call(other.chmod, 0o755)
        host.run("mount", "--bind", str(other), path)
        mounted.append(path)

    yield put
    for path in reversed(mounted):
        host.run("umount", path)


def test_hardly_any_room_for_connections(patient: Patient, instead: Callable[[str, str], None]) -> None:
    instead("/proc/sys/net/netfilter/nf_conntrack_count", "810\n")
    instead("/proc/sys/net/netfilter/nf_conntrack_max", "1000\n")
    failed = patient.failed()
    assert failed.keys() == {"connection tracking has room"}
    assert "nf_conntrack_max = 2000" in failed["connection tracking has room"]["do"]


def test_an_old_nft(patient: Patient, instead: Callable[[str, str], None]) -> None:
    real = patient.host.run("sh", "-c", "command -v nft").stdout.strip()
    patient.host.run("cp", real, "/run/real-nft")
    old = 'case $1 in --version) echo "nftables v0.9.8 (E.D.S.)";; *) exec /run/real-nft "$@";; esac'
    instead(real, f"#!/bin/sh\n{old}\n")
    failed = patient.failed()
    assert failed.keys() == {"nft is recent enough"}
    assert "0.9.8" in failed["nft is recent enough"]["found"]
    assert "1.0.6" in failed["nft is recent enough"]["do"]


def test_an_agent_that_does_not_run(patient: Patient) -> None:
    patient.agent.stop()
    found = patient.doctor()
    assert found["failed"].keys() == {"agent answers"}
    assert found["failed"]["agent answers"]["do"] == doctor.RESTART_AGENT
    assert found["skipped"]["agent is current"] == "the agent does not answer"


def test_an_agent_that_goes_by_other_settings(patient: Patient) -> None:
    others = {**patient.firewall.settings, "fleet": {"keys": ["x" * 32]}, "host": {"login_users": [LOGIN_USER]}}
    failed = patient.failed(saved=others, pillar=None)
    assert failed.keys() == {"agent is current"}
    assert failed["agent is current"]["do"] == doctor.RESTART_AGENT


@pytest.mark.parametrize(("mode", "words"), [("600", "may not use"), ("666", "is not for everyone")])
def test_permissions_of_the_socket(patient: Patient, mode: str, words: str) -> None:
    patient.host.run("chmod", mode, client.SOCKET)
    failed = patient.failed()
    assert failed.keys() == {"dovecot can tell the agent"}
    assert words in failed["dovecot can tell the agent"]["found"]
    assert failed["dovecot can tell the agent"]["do"] == doctor.RESTART_AGENT


def test_a_directory_that_dovecots_user_cannot_pass(patient: Patient) -> None:
    patient.host.run("chmod", "700", "/run/mailfw")
    failed = patient.failed()
    assert failed.keys() == {"dovecot can tell the agent"}
    assert failed["dovecot can tell the agent"]["do"] == "run `chmod a+rx /run/mailfw`"
    assert patient.mended(failed["dovecot can tell the agent"]["do"])


def test_a_user_that_is_not_to_tell_of_logins(patient: Patient) -> None:
    others = {**patient.firewall.settings, "host": {"login_users": ["daemon"]}}
    patient.host.run("chgrp", "daemon", client.SOCKET)
    failed = patient.failed(saved=others)
    assert failed.keys() == {"dovecot can tell the agent"}
    assert "refuses a login that daemon reports" in failed["dovecot can tell the agent"]["found"]


def test_logins_that_wait_for_their_echo(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    patient.agent.login("203.0.113.1")
    assert patient.failed() == {}
    monkeypatch.setattr(doctor, "LATE", 0)
    failed = patient.failed()
    assert failed.keys() == {"logins reach the fleet"}
    assert "1 logins wait" in failed["logins reach the fleet"]["found"]

    def echoed() -> bool:
        """Have the newest message come back: what is late is announced again."""
        for event in patient.agent.events()[-1:]:
            patient.agent.ask("receive", event["data"]["message"])
        return patient.agent.status()["outbox"] == 0

    until(echoed, "its echo")
    assert patient.failed() == {}


def test_a_webmail_in_a_container(patient: Patient, alice: Client) -> None:
    """alice is one here: on a bridge of the host's that leads nowhere else."""
    patient.host.ip("link add docker0 type bridge")
    try:
        patient.host.ip(f"link add veth0 master docker0 type veth peer name eth1 netns {alice.name}")
        patient.host.ip("addr add 172.17.0.1/16 dev docker0")
        patient.host.ip("link set docker0 up")
        patient.host.ip("link set veth0 up")
        alice.ip("addr add 172.17.0.2/16 dev eth1")
        alice.ip("link set eth1 up")
        session = alice.open(993, "172.17.0.2")
        failed = patient.failed()
        assert failed.keys() == {"containers are let in"}
        assert "mailfw:exempt (networks_ipv4: [172.17.0.2/32]) in pillar" in failed["containers are let in"]["do"]
        patient.load({**PILLAR, "exempt": {"networks_ipv4": ["172.17.0.2/32"]}})
        assert patient.failed() == {}
        session.close()
    finally:
        patient.host.ip("link delete docker0")
        patient.host.ip("link delete veth0")


def test_sessions_from_elsewhere_are_no_containers(patient: Patient, alice: Client) -> None:
    session = alice.open(993, alice.ipv4[0])
    assert patient.failed() == {}
    session.close()


def test_a_proxy_before_dovecot(patient: Patient, tmp_path: Path) -> None:
    patient.load({**PILLAR, "services": {"imaps": {"port": 1993}}})
    (tmp_path / "haproxy").symlink_to("/usr/bin/python3")
    listen = "import socket, time; s = socket.create_server(('', 1993)); print(flush=True); time.sleep(60)"
    proxy = patient.host.call(
        subprocess.Popen, [str(tmp_path / "haproxy"), "-c", listen], stdout=subprocess.PIPE, text=True
    )
    try:
        proxy.stdout.readline()
        failed = patient.failed()
        assert failed.keys() == {"local proxies tell who connects"}
        assert "haproxy listens on port 1993" in failed["local proxies tell who connects"]["found"]
    finally:
        proxy.kill()
        proxy.communicate()
    assert patient.failed() == {}
