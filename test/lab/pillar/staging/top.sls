staging:
  'mx*':
    - mailfw
    - fleet
