mailfw:
  protection:
    type: autoban
