"""Salt's own client, for many calls on a master: JSON lines in, JSON lines out. Starting `salt` takes a second.

A call is a list: minions, function, arguments, and for how many seconds to wait for each answer.
"""

from __future__ import annotations

import json
import sys

import salt.client
import salt.config
import salt.exceptions


def main() -> None:
    """Make the calls; print what the minions answered, by minion, or why nothing could be asked."""
    opts = salt.config.client_config("/etc/salt/master")
    for line in sys.stdin:
        minions, function, arguments, timeout = json.loads(line)
        try:
            # A new one for each call, since the master may have restarted.
            with salt.client.LocalClient(mopts=opts) as client:
                answers = client.cmd(
                    minions, function, arguments, timeout, tgt_type="list", gather_job_timeout=min(60, timeout)
                )
        except salt.exceptions.SaltException as err:
            answers = f"{type(err).__name__}: {err}"
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
