"""Fire the events that come as JSON lines on standard input, on the minion's event bus; say whether a master is there.

Started by mailfw-agent with Salt's Python and the minion's configuration directory. A process of its own, so that
neither a slow minion nor a broken Salt touches the agent.

A line on standard output for each change: ``up`` when the minion's bus and a master can be reached, ``down`` when not.
"""

import json
import os
import socket
import sys
import threading
import time

import salt.config
import salt.utils.event
import salt.utils.network

#: Seconds between two looks at whether minion and master can be reached, and that a look may take.
LOOK_EVERY = 2.0
PATIENCE = 2.0


def main(configuration: str) -> None:
    """Carry out each line: an event for the master, or a job of the minion's schedule that is to run now."""
    opts = salt.config.minion_config(os.path.join(configuration, "minion"))
    threading.Thread(target=watch, args=(opts,), daemon=True).start()
    bus = salt.utils.event.get_event("minion", opts=opts, listen=False)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            fired = fire(bus, request)
        except Exception as err:  # Salt's and Tornado's, of each version its own
            print(f"the minion's event bus: {err!r}", file=sys.stderr, flush=True)
            bus.destroy()
            bus = salt.utils.event.get_event("minion", opts=opts, listen=False)
            fired = fire(bus, request)
        if not fired:
            print("the minion's event bus does not answer", file=sys.stderr, flush=True)


def fire(bus, request) -> bool:
    """Fire ``{"tag": ..., "data": ...}`` or have ``{"run": JOB}`` run; return whether the minion's bus took it."""
    if "run" in request:
        return bus.fire_event({"func": "run_job", "name": request["run"]}, "manage_schedule", timeout=2000)
    load = {"tag": request["tag"], "data": request["data"], "events": None, "pretag": None}
    return bus.fire_event(load, "fire_master", timeout=2000)


def watch(opts) -> None:
    """Say whether minion and master can be reached, now and whenever that changes."""
    was = None
    while True:
        now = minion_there(opts) and any(master_there(opts, master) for master in masters(opts))
        if now != was:
            print("up" if now else "down", flush=True)
            was = now
        time.sleep(LOOK_EVERY)


def minion_there(opts) -> bool:
    """Return whether a minion listens on this host's event bus."""
    if opts["ipc_mode"] == "tcp":
        return connects(("127.0.0.1", int(opts["tcp_pull_port"])))
    directory = opts["sock_dir"]
    sockets = [
        name for name in os.listdir(directory) if name.startswith("minion_event_") and name.endswith("_pull.ipc")
    ]
    for name in sockets:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(os.path.join(directory, name)) == 0:
                return True
    return False


def masters(opts):
    """Return the masters of this minion, each as its name or address and its port."""
    names = opts["master"] if isinstance(opts["master"], list) else [opts["master"]]
    found = []
    for name in names:
        host, port = (
            (name, None) if opts["master_uri_format"] == "ip_only" else salt.utils.network.parse_host_port(name)
        )
        found.append((str(host), int(port or opts["master_port"])))
    return found


def master_there(opts, master) -> bool:
    """Return whether a master can be connected to. A function that names it (``master_type: func``) is not asked."""
    return opts["master_type"] in ("func", "disable") or connects(master)


def connects(address) -> bool:
    """Return whether something listens there."""
    try:
        socket.create_connection(address, PATIENCE).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
