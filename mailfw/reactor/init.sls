# For the master: the reactor, the runner, and the configuration for them. Run it on the master's own minion with
# `salt-call state.apply mailfw.reactor`: the master is restarted when its configuration changes, or the runner.
include:
  - mailfw.sync

mailfw master settings are valid:
  mailfw.settings_valid:
    - require:
      - saltutil: mailfw extension modules are synced

# The file server would cost the master more for each event than all the rest.
mailfw master reacts to logins:
  file.managed:
    - name: {{ opts["conf_file"].rpartition("/")[0] }}/mailfw/login.sls
    - source: salt://mailfw/reactor/login.sls
    - mode: "0644"
    - makedirs: True
    - require:
      - mailfw: mailfw master settings are valid

mailfw master knows the fleet:
  mailfw.reactor_configured:
    - require:
      - file: mailfw master reacts to logins

mailfw runner is synced:
  mailfw.runner_synced:
    - require:
      - mailfw: mailfw master settings are valid

# Otherwise its processes go on with the runner, and the package, that they have read.
mailfw master is restarted:
  cmd.run:
    - name: systemctl restart --no-block salt-master
    - onchanges:
      - mailfw: mailfw master knows the fleet
      - mailfw: mailfw runner is synced
