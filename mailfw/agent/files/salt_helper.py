"""Fire the events that come as JSON lines on standard input, on the minion's event bus.

Started by mailfw-agent with Salt's Python and the minion's configuration directory. A process of its own, so that
neither a slow minion nor a broken Salt touches the agent.
"""

import json
import os
import sys

import salt.config
import salt.utils.event


def main(configuration: str) -> None:
    """Fire one event for each line: ``{"tag": ..., "data": ...}``."""
    opts = salt.config.minion_config(os.path.join(configuration, "minion"))
    with salt.utils.event.get_event("minion", opts=opts, listen=False) as bus:
        for line in sys.stdin:
            event = json.loads(line)
            load = {"tag": event["tag"], "data": event["data"], "events": None, "pretag": None}
            if not bus.fire_event(load, "fire_master", timeout=2):
                print("the minion's event bus does not answer", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
