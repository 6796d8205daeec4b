#!/usr/bin/env python3
"""Show mailfw's main job on the lab's booted hosts: what each client really sees, step by step.

Exits with 1 when anything that is observed is not what it should be. The lab stays up for looking around.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.lab import (
    ADDRESSES,
    SERVICES,
    Session,
    all_states,
    changed,
    client,
    configure_master,
    on_each,
    run,
    salt,
    set_pillar,
    states,
)

HOSTS = ("mx1", "mx2")
#: Who trusts what in the demo's pillars: home's networks, where a mode has any.
HOME = {"networks_ipv4": ["198.51.100.0/24"], "networks_ipv6": ["2001:db8:0:2::/64"]}
LOGIN_SERVICES = [name for name in SERVICES if name != "smtp"]
READING = ["imap", "imaps", "pop3", "pop3s", "sieve"]
#: What a client that is not trusted may reach in each mode; home's networks are trusted in private mode.
OPEN_TO_ANYONE = {
    "autoban": list(SERVICES),
    "protected": ["smtp", *READING],
    "private": ["smtp"],
    "public": list(SERVICES),
}

failures: list[str] = []


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def observe(what: str, seen: object, wanted: object) -> None:
    """Print an observation, and remember it when it is not the wanted one."""
    good = seen == wanted
    print(f"  {'ok ' if good else 'BAD'} {what}: {seen}" + ("" if good else f"   (wanted: {wanted})"), flush=True)
    if not good:
        failures.append(f"{what}: {seen}, wanted {wanted}")


def show(text: str) -> None:
    print("    " + text.strip().replace("\n", "\n    "), flush=True)


def reachable(name: str, host: str) -> dict[int, list[str]]:
    """Return the services of a host that a client reaches: IP version -> names."""
    seen = {}
    for version, address in zip((4, 6), ADDRESSES[host]):
        outcomes = client(name, "probe", targets=[[address, port] for port in SERVICES.values()])
        seen[version] = [service for service, outcome in zip(SERVICES, outcomes) if outcome == "open"]
    return seen


def listed(*what: str) -> list[str]:
    """Return the addresses that mx1 lists."""
    return sorted({row["address"] for row in salt("mx1", "mailfw.list", *what)["mx1"]["rows"]})


def install() -> None:
    title("1. The master learns of the fleet, and a highstate from it guards two mail hosts")
    configure_master()
    preview = all_states(HOSTS, "state.apply", "mailfw", "test=True")
    first, second = all_states(HOSTS), all_states(HOSTS)
    for host in HOSTS:
        show(f"{host}, test=True before the first run: {next(iter(preview[host].values()))['comment']}")
        print(f"  {host}: {len(first[host])} states, {len(changed(first[host]))} changed")
        observe(f"{host}: changes of a second highstate", changed(second[host]), [])


def forget() -> None:
    """Let a demo that is run again begin like the first."""
    for address in ("198.51.100.10", "2001:db8:0:2::10", "203.0.113.10", "2001:db8:0:3::10"):
        salt(",".join(HOSTS), "mailfw.untrust", address)
    for address in ("198.18.0.66", "198.18.0.67", "198.18.0.68", "198.18.0.69", "2001:db8:0:66::66"):
        salt(",".join(HOSTS), "mailfw.clear", address)


def modes() -> None:
    title("2. Each mode, as home (a trusted network in private mode), cafe and bot see every port, over IPv4 and IPv6")
    rounds = [("autoban", "private"), ("protected", "public"), ("private", "autoban"), ("public", "protected")]
    for prod, staging in rounds:
        settings = (("mx1", "prod", prod), ("mx2", "staging", staging))
        for _, environment, mode in settings:
            set_pillar(environment, protection={"type": mode}, **({"trusted": HOME} if mode == "private" else {}))
        all_states(HOSTS)
        seen = on_each(product(("home", "cafe", "bot"), HOSTS), lambda pair: reachable(*pair))
        for host, environment, mode in settings:
            for name in ("home", "cafe", "bot"):
                wanted = list(SERVICES) if (name, mode) == ("home", "private") else OPEN_TO_ANYONE[mode]
                what = f"{mode:9} {host} ({environment}) from {name:4}"
                observe(what, seen[name, host], {4: wanted, 6: wanted})


def login_opens_submission() -> None:
    title("3. Protected mode: a login at mx1 opens submission on mx1 and, through Salt, on mx2")
    for environment in ("prod", "staging"):
        set_pillar(environment, protection={"type": "protected"}, reaction={"untrusted": "reject"})
    all_states(HOSTS)
    for name, version in (("home", 0), ("cafe", 1)):
        watch = [[ADDRESSES[host][version], 587] for host in HOSTS]
        observe(f"{name}: submission on mx1 and mx2 before", client(name, "probe", targets=watch), ["refused"] * 2)
        waited = client(name, "login_opens", address=ADDRESSES["mx1"][version], watch=watch)["seconds"]
        observe(
            f"{name}: submission after an IMAP login at mx1",
            ["open" if one else "closed" for one in waited],
            ["open"] * 2,
        )
        print(
            f"      from the login's OK to an accepted connection: {waited[0]:.3f} s on mx1, {waited[1]:.3f} s on mx2"
        )
        for host in HOSTS:
            address, subject = ADDRESSES[host][version], f"{name} {host} {time.time()}"
            client(name, "send", address=address, subject=subject)
            observe(
                f"{name}: a message sent over STARTTLS to {host} arrives",
                client(name, "arrived", address=address, subject=subject),
                True,
            )
    observe("bot: submission on mx1, still", client("bot", "probe", targets=[[ADDRESSES["mx1"][0], 587]]), ["refused"])
    for host in HOSTS:
        print(f"  {host}: nft list set inet mailfw trusted_ipv4")
        show(run(host, "nft", "list", "set", "inet", "mailfw", "trusted_ipv4"))


def brute_force() -> None:
    title("4. A brute force by bot is banned at the configured rate; home and cafe notice nothing")
    # So slow a rate that nothing is added to the burst meanwhile.
    set_pillar("prod", protection={"type": "protected"}, reaction={"untrusted": "reject"}, autoban={"rate": "1/hour"})
    states("mx1")
    address = ADDRESSES["mx1"][0]
    guesses = client("bot", "guess", address=address, tries=40, source="198.18.0.67")
    observe("bot: 40 guesses at once, a burst of 20", guesses, {"served": 20, "refused": 20})
    observe("mx1: banned", listed("banned", "role=dovecot"), ["198.18.0.67"])
    show(json.dumps(salt("mx1", "mailfw.check", "198.18.0.67")["mx1"]["services"], indent=1))
    observe(
        "bot: imap from the banned address",
        client("bot", "probe", targets=[[address, 143]], source="198.18.0.67", patience=1),
        ["silent"],
    )
    observe(
        "bot: imap from another address of its own",
        client("bot", "probe", targets=[[address, 143]], source="198.18.0.68"),
        ["open"],
    )
    observe("home: imap", client("home", "probe", targets=[[address, 143]]), ["open"])
    client("home", "send", address=address, subject="during the attack")
    print("  ok  home: sent a message meanwhile")


def switch_mode() -> None:
    title("5. A pillar edit and a highstate switch mx1 to private: trust and open sessions stay")
    before = listed("trusted")
    set_pillar("prod", protection={"type": "private"}, trusted=HOME)
    session = Session("cafe", ADDRESSES["mx1"][1])
    results = states("mx1")
    show(next(one["changes"]["diff"] for one in results.values() if one["__id__"] == "mailfw ruleset is loaded"))
    observe("cafe: an IMAP session that was open over the switch answers", session.answers(), True)
    after = listed("trusted")
    observe("mx1: trusted addresses before and after", after, before)
    observe(
        "bot: imap on mx1",
        client("bot", "probe", targets=[[ADDRESSES["mx1"][0], 143]], source="198.18.0.69"),
        ["refused"],
    )
    observe("mx1: changes of a second highstate", changed(states("mx1")), [])


def main() -> int:
    started = time.monotonic()
    for step in (install, forget, modes, login_opens_submission, brute_force, switch_mode):
        step()
    title(
        f"{'Everything was as it should be' if not failures else f'{len(failures)} observations were wrong'}"
        f" ({time.monotonic() - started:.0f} s). The lab is up:"
    )
    print("  test/lab/lab status                               what is there")
    print("  test/lab/lab exec master -- salt 'mx*' mailfw.check 203.0.113.10")
    print("  test/lab/lab exec mx1 -- nft list map inet mailfw services")
    print("  test/lab/lab down                                 ends it")
    for failure in failures:
        print(f"  BAD {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
