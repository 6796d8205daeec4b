"""The rules that settings give, rendered as the execution module does it, and what they say; pillars to give."""

import functools
import re

from hypothesis import strategies as st
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mailfwlib import rules, settings

_OBJECT = re.compile(r"^\t(set|map|chain) (\S+) \{\n(.*?)^\t\}$", re.M | re.S)
_COUNTER = re.compile(r"^\tcounter (\S+) \{ \}$", re.M)
_VERDICT = re.compile(r"(\d+) : (accept|goto \w+)")


@functools.cache
def _templates(root):
    return Environment(loader=FileSystemLoader(root), undefined=StrictUndefined, autoescape=False)


class Rules:
    """Rule files as text, and their objects."""

    def __init__(self, resolved, root):
        templates = _templates(root)
        shared = rules.context(resolved)
        self.files = {
            name: "\n".join(
                templates.get_template(f"mailfw/{part['source']}").render({**shared, **part}) + "\n" for part in parts
            )
            for name, parts in rules.files(resolved).items()
        }
        self.text = "\n".join(self.files.values())
        self.objects = {kind: {} for kind in ("set", "map", "chain")}
        for kind, name, body in _OBJECT.findall(self.text):
            self.objects[kind][name] = self.objects[kind].get(name, "") + body
        self.counters = set(_COUNTER.findall(self.text))

    def verdicts(self, name):
        """Return the elements of a verdict map: port -> verdict; no port may be there twice."""
        found = _VERDICT.findall(self.objects["map"][name])
        assert len(dict(found)) == len(found)
        return {int(port): verdict for port, verdict in found}

    def statements(self, chain):
        """Return the rules of a chain."""
        lines = map(str.strip, self.objects["chain"][chain].splitlines())
        return [line for line in lines if line and not line.startswith("#")]


ROLES = [["postfix", "dovecot"], ["postfix"], ["dovecot"], []]
rates = st.sampled_from(["1/day", "10/minute", "100000/day", "100000/second"])
KEY = "0123456789abcdef0123456789abcdef"
MARKS = st.sets(st.integers(0, 31), min_size=2, max_size=2).map(lambda bits: sum(1 << bit for bit in bits))
#: Settings that change what the rules say.
pillars = st.fixed_dictionaries(
    {
        "protection": st.fixed_dictionaries(
            {
                "type": st.sampled_from(settings.MODES),
                "services": st.dictionaries(st.sampled_from(settings.LOGIN_SERVICES), st.sampled_from(settings.MODES)),
            }
        ),
        "roles": st.sampled_from(ROLES),
        "enforce": st.booleans(),
        "services": st.dictionaries(
            st.sampled_from(settings.LOGIN_SERVICES), st.just(False) | st.just({}), max_size=len(settings.SERVICES)
        ).flatmap(
            # One service may move, too.
            lambda changed: st.sampled_from([changed, {**changed, "submission": {"port": 2587}}])
        ),
        "log": st.sampled_from([False, {}, {"group": 0}, {"group": 65535}]) | st.fixed_dictionaries({"rate": rates}),
        "sizes": st.dictionaries(st.sampled_from(list(settings.SCHEMA["sizes"])), st.integers(1, 2**24)),
        "mark": MARKS,
        "fleet": st.just({"keys": [KEY]}),
        "autoban": st.fixed_dictionaries(
            {
                "rate": rates,
                "burst": st.sampled_from([1, 20, 10_000]),
                "period": st.sampled_from(["1s", "1h", "366d"]),
                "ipv6_prefix": st.sampled_from([56, 64, 128]),
                "networks": st.sampled_from([False, {}, {"rate": "100000/day", "ipv4_prefix": 20, "ipv6_prefix": 44}]),
            }
        ),
        "trusted": st.fixed_dictionaries(
            {
                "ipv6_prefix": st.sampled_from([64, 128]),
                "networks_ipv4": st.sampled_from([[], ["192.0.2.0/24"]]),
                "networks_ipv6": st.sampled_from([[], ["2001:db8::/48", "2001:db8:2::/48"]]),
            }
        ),
        "reaction": st.fixed_dictionaries(
            {
                "banned": st.sampled_from(["drop", "reject"]),
                "blocked": st.sampled_from(["drop", "reject"]),
                "untrusted": st.sampled_from(["hold", "reject", "drop"]),
            }
        ),
    }
)
