# The role's rules are templates beside this file; mailfw.ruleset loads the one of the mode.
include:
  - mailfw.ruleset
