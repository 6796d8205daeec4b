base:
  'mx*':
    - mailfw
