"""What mailfw knows without Salt: settings, elements, the packet filter, signed messages, the host's agent.

A plain package: no module in it imports Salt, and everything in it runs with the standard library of
Python 3.9 and later. The execution module, the states, the runner and the agent all build on it.
"""

__version__ = "0.1.0"
