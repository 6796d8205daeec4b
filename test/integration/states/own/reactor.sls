# A reactor that has nothing to do with mailfw, from the master's main configuration file.
own reactor has run:
  local.file.touch:
    - tgt: mx1
    - args:
      - name: /run/own-reactor-has-run
