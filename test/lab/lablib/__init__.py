"""The parts of the `lab` command: mail hosts, a Salt master and clients on one machine."""
