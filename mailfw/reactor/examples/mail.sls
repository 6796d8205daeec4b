#!py
"""Example of a reactor that mails what mail hosts tell: docs/events.md says how to use it, and what the events hold.

Any accepted minion can fire such an event with whatever it likes in it. So nothing of an event gets into a header, a
command or the name of a file; in the body it is a line of ASCII for each field that is known; and nobody gets more than
MOST mails an hour for each tag. What is one too many for its tag keeps no other one from being mailed.
"""

import json
import logging
import os
import time

#: Tag -> the fields of its data.
EVENTS = {
    "mailfw/ban": ("host", "role", "address", "until"),
    "mailfw/block": ("host", "address", "until", "by", "reason"),
    "mailfw/full": ("host", "set", "size"),
    "mailfw/healed": ("host", "altered"),
    "mailfw/open": ("host", "until", "reason"),
    "mailfw/roaming": ("host", "user", "addresses"),
}
#: Mails for each tag within an hour, and characters of a field.
MOST, LONGEST = 30, 300

log = logging.getLogger(__name__)


def run():
    """Return what to do for an event: ``tag``, ``data`` and ``__opts__`` are Salt's."""
    ours, lines = __opts__.get("mailfw_mail") or {}, _lines(data.get("data"))
    if not ours.get("to") or not lines:
        return {}
    count = _count(time.time())  # There are lines: the tag is one of EVENTS.
    if count > MOST:
        return {}
    if count == MOST:
        lines.append(f"This is mail {MOST} of this kind within an hour. The master's log says how many more there are.")
    headers = [f"To: {ours['to']}", f"Subject: {tag}", "Auto-Submitted: auto-generated"]
    arguments = {
        "fun": "cmd.run",
        "cmd": ours.get("command", ["/usr/sbin/sendmail", "-i", "-t"]),
        "stdin": "\n".join([*headers, "", *lines, ""]),
        # Without this Salt takes the two characters \n of a string for a line break.
        "stdin_raw_newlines": True,
        "python_shell": False,
    }
    mail = {"runner.salt.cmd": [{"args": [{name: value} for name, value in arguments.items()]}]}
    return {"an event of mailfw is mailed": mail}


def _lines(sent):
    """Return what a mail says of an event's data: nothing where there is nothing that is known."""
    if not isinstance(sent, dict):
        return []
    return [f"{name}: {_text(name, sent[name])}" for name in EVENTS.get(tag, ()) if name in sent]


def _text(name, value):
    """Return a field as one line of ASCII; times as people read them."""
    if name == "until" and isinstance(value, int) and 0 < value < 1 << 34:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value))
    return json.dumps(value)[:LONGEST]


def _count(now):
    """Return how many mails for this tag there are within an hour with this one; those too many are counted and logged."""
    path = os.path.join(__opts__["cachedir"], f"mailfw_mail_{tag.rpartition('/')[2]}.json")
    try:
        with open(path, encoding="ascii") as stream:
            kept = json.load(stream)
    except (OSError, ValueError):
        kept = {"mailed": [], "dropped": 0, "logged": 0}
    recent = [at for at in kept["mailed"] if now - 3600 < at <= now]
    if len(recent) < MOST:
        kept["mailed"] = [*recent, now]
    else:
        kept["dropped"] += 1
    if kept["dropped"] and not now - 3600 < kept["logged"] <= now:
        log.warning("mailfw: %s events %s were not mailed: more than %s an hour", kept["dropped"], tag, MOST)
        kept.update(dropped=0, logged=now)
    with open(path, "w", encoding="ascii") as stream:
        json.dump(kept, stream)
    return len(recent) + 1
