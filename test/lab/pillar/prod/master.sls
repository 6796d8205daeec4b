# The master is of the fleet, but has no mail ports to guard.
mailfw:
  roles: []
