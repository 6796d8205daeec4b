"""The rules that settings give, rendered as the execution module does it, and what they say."""

import functools
import re

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mailfwlib import rules

_OBJECT = re.compile(r"^\t(set|map|chain) (\S+) \{\n(.*?)^\t\}$", re.M | re.S)
_COUNTER = re.compile(r"^\tcounter (\S+) \{ \}$", re.M)
_VERDICT = re.compile(r"(\d+) : (accept|goto \w+)")


@functools.cache
def _templates(root):
    return Environment(loader=FileSystemLoader(root), undefined=StrictUndefined, autoescape=False)


class Rules:
    """Rule files as text, and their objects."""

    def __init__(self, settings, root):
        templates = _templates(root)
        shared = rules.context(settings)
        self.files = {
            name: "\n".join(
                templates.get_template(f"mailfw/{part['source']}").render({**shared, **part}) + "\n" for part in parts
            )
            for name, parts in rules.files(settings).items()
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
