# For the master: removes what mailfw.reactor made, and what the fleet has told the master. Its own `reactor:` and
# `peer_run:` are in its main file, as they were.
{%- set configuration = opts["conf_file"].rpartition("/")[0] %}
{%- set cache = salt["saltutil.runner"]("config.get", ["cachedir"]) %}

mailfw master does not know the fleet:
  file.absent:
    - names:
      - {{ configuration }}/master.d/mailfw.conf
      - {{ configuration }}/mailfw

# Waits, unlike after the installation: until then the old master takes logins down.
mailfw master is restarted without the fleet:
  cmd.run:
    - name: systemctl try-restart salt-master
    - onchanges:
      - file: mailfw master does not know the fleet

mailfw master has forgotten the fleet:
  file.absent:
    - names:
      - {{ (cache ~ "/mailfw.sqlite") | json }}
      - {{ (cache ~ "/mailfw.sqlite-journal") | json }}
      - {{ (cache ~ "/mailfw.lock") | json }}
    - require:
      - cmd: mailfw master is restarted without the fleet
