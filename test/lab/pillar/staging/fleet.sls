# The lab's key and nobody else's: it is public, so never use it outside. The same in prod and staging.
mailfw:
  fleet:
    keys:
      - 6c61622d6b65792d6f662d6d61696c66772d2d6e6f742d666f722d7573652121
  # The lab's few users log in from more addresses than people do.
  trusted:
    per_user: 10000
