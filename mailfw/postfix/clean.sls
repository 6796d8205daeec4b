# The role leaves nothing of its own on a host: its rules go with mailfw.ruleset.clean.
include:
  - mailfw.ruleset.clean
