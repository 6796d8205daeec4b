"""The product's rules on the mail host, and what the kernel says of them."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2

from mailfwlib import breakglass, elements, explain, netlink, nft, parse, rules, ruleset, settings, snapshot
from support.net import REPOSITORY, Host

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(REPOSITORY), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


def rule_files(resolved: settings.Settings) -> dict[str, str]:
    """Return the rule files for some settings: name -> text."""
    shared = rules.context(resolved)
    return {
        name: "\n".join(
            _templates.get_template(f"mailfw/{part['source']}").render({**shared, **part}) for part in parts
        )
        for name, parts in rules.files(resolved).items()
    }


def render(resolved: settings.Settings) -> str:
    """Return the rules for some settings, as one nft script."""
    return ruleset.joined(rule_files(resolved))


def element_text(element: dict[str, Any]) -> str:
    """Return the value of an element that nft has listed as JSON, such as ``192.0.2.1 . 587``."""
    value = element["val"]
    return " . ".join(map(str, value["concat"])) if isinstance(value, dict) else str(value)


#: So many elements the kernel gives in one part of a list at least.
FEW = 100


class Firewall:
    """The mail host's firewall: rules for a pillar, and the scripts of mailfwlib.elements, run in the kernel."""

    def __init__(self, host: Host):
        self._host = host
        self.settings: settings.Settings = {}

    def script(self, **pillar: Any) -> str:
        """Return the rules for a pillar; from now on its settings are this firewall's."""
        self.settings = settings.resolve(pillar)
        return render(self.settings)

    def load(self, **pillar: Any) -> str:
        """Load the rules for a pillar; return the diff."""
        return self.apply(self.script(**pillar))

    def apply(self, script: str) -> str:
        """Load some rules; return the diff."""
        return self._host.call(ruleset.apply, script)

    def unload(self) -> None:
        """Remove every table, and what is known of them."""
        self.run("flush ruleset")
        for path in (ruleset.LOADED, ruleset.UNLOADED, snapshot.PATH, breakglass.STATE):
            self._host.call(path.unlink, missing_ok=True)

    def run(self, script: str) -> None:
        """Run an nft script."""
        self._host.call(nft.run, script)

    def nft(self, *arguments: str) -> str:
        """Return what an nft command prints."""
        return self._host.call(nft.command, *arguments)

    def ruleset(self, *options: str) -> str:
        """Return every table as nft lists it, but for the time that elements have left."""
        return re.sub(r" expires \S+", "", self.nft(*options, "list", "ruleset"))

    def elements(self, name: str) -> dict[str, float]:
        """Return a set's elements, such as ``192.0.2.1`` or ``192.0.2.1 . 587``: element -> seconds left."""
        return {element_text(one): one.get("expires", float("inf")) for one in self._listed(name)}

    def notes(self, name: str) -> dict[str, str]:
        """Return the comments of a set's elements, of those that have one."""
        return {element_text(one): one["comment"] for one in self._listed(name) if "comment" in one}

    def _listed(self, name: str) -> list[dict[str, Any]]:
        """Return a set's elements; of many, the kernel may leave some out just after they were added: see netlink."""
        found = self._list(name)
        while len(found) > FEW and len(again := self._list(name)) != len(found):
            found = again
        return found

    def _list(self, name: str) -> list[dict[str, Any]]:
        printed = json.loads(self.nft("-j", "list", "set", *nft.TABLE.split(), name))
        listed = next(entry["set"] for entry in printed["nftables"] if "set" in entry).get("elem", [])
        return [one["elem"] if isinstance(one, dict) and "elem" in one else {"val": one} for one in listed]

    def counter(self, name: str) -> int:
        """Return the packets of a decision."""
        return nft.decisions(self.nft("-j", "-t", "list", "ruleset"))[name]

    def trust(self, address: str, seconds: int = 3600, ports: list[int] | None = None, note: str = "") -> None:
        """Trust an address as a login does, or with a note as an operator does."""
        ports = settings.login_ports(self.settings) if ports is None else ports
        self.run(elements.trust(parse.address(address), dict.fromkeys(ports, seconds), self.settings, note))

    def untrust(self, address: str, ports: list[int] | None = None) -> None:
        """End an address's trust."""
        ports = settings.login_ports(self.settings) if ports is None else ports
        self.run(elements.untrust(parse.address(address), ports, self.settings))

    def ban(self, address: str, roles: tuple[str, ...] = settings.ROLES, seconds: int | None = None) -> None:
        """Ban a source."""
        self.run(elements.ban(parse.address(address), roles, seconds, self.settings))

    def unban(self, address: str, roles: tuple[str, ...] = settings.ROLES) -> None:
        """Lift a source's bans."""
        self.run(elements.unban(parse.address(address), roles, self.settings))

    def refill(self, address: str) -> None:
        """Empty what the meters remember of a source."""
        meters = [f"rate_{role}_{family}" for role in settings.ROLES for family in ("ipv4", "ipv6")]
        self.run(elements.refill(parse.address(address), meters, self.settings))

    def block(self, address: str, seconds: int | None = None) -> None:
        """Block a source."""
        self.run(elements.block(parse.address(address), seconds, self.settings))

    def unblock(self, address: str) -> None:
        """End a source's block."""
        self.run(elements.unblock(parse.address(address), self.settings))

    def explain(self, address: str) -> dict[str, Any]:
        """Return what the host says of an address."""
        known = {**self.settings, "host": {"id": "mx1"}}
        names = [service["name"] for service in self.settings["services"]]
        return self._host.call(lambda: explain.explain(parse.address(address), known, netlink.Kernel(), names))
