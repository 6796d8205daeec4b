"""Fire whatever comes as JSON lines on standard input on a minion's event bus: what a compromised host could do."""

import json
import os
import sys

import salt.config
import salt.utils.event

opts = salt.config.minion_config(os.path.join(sys.argv[1], "minion"))
with salt.utils.event.get_event("minion", opts=opts, listen=False) as bus:
    for line in sys.stdin:
        if not bus.fire_event(json.loads(line), "fire_master", timeout=5):
            sys.exit("the minion's event bus does not answer")
        print("fired", flush=True)
