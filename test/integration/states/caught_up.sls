# The last state of mailfw.agent, for hosts whose agent the tests start.
mailfw agent is known to the fleet:
  mailfw.caught_up: []
