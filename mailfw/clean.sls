# Removes everything that mailfw made on a mail host. Dovecot first, so that logins go on.
include:
  - mailfw.dovecot.clean
  - mailfw.agent.clean
  - mailfw.ruleset.clean
