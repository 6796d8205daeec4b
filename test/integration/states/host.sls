# mailfw as it is, without what needs a systemd that runs and a Dovecot.
include:
  - mailfw

exclude:
  - id: mailfw rules are kept
  - id: mailfw agent can be reached
  - id: mailfw agent is running
  - id: mailfw agent catches up with the fleet
  - id: mailfw agent is known to the fleet
  - id: mailfw login hook is run by Dovecot
  - id: mailfw login hook is known to Dovecot
  - id: mailfw login hook is run after each login
