# mailfw.reactor as it is; the tests start the master themselves.
include:
  - mailfw.reactor

exclude:
  - id: mailfw master is restarted
