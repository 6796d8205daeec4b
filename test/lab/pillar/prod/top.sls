prod:
  'mx*':
    - mailfw
    - fleet
  master:
    - master
    - fleet
