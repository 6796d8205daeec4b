# The operator's own reaction to `salt-call event.send lab/own`: it leaves a file on the master.
note lab/own:
  local.file.touch:
    - tgt: master
    - args:
        - name: /run/lab-own-reacted
