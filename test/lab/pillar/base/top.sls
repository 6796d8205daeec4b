# Nothing: every host of the lab has pillar of its environment only.
base: {}
