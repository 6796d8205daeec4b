# mailfw's own modules, states and package, before anything that needs them. They live in the base environment only:
# a sync from another environment alone would remove those of base.
mailfw extension modules are synced:
  saltutil.sync_all:
    - refresh: True
    - saltenv: base
    - order: 1
