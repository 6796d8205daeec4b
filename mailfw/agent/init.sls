# The host's agent: trusts the addresses of logins, here and, through the master, on the fleet's other mail hosts.
{%- from "mailfw/map.jinja" import os, metrics, metrics_directory, roles with context %}

include:
  - mailfw.ruleset

mailfw agent can be started:
  file.managed:
    - names:
      - /usr/lib/mailfw/mailfw-agent:
        - source: salt://mailfw/agent/files/mailfw-agent
        - mode: "0755"
      - /usr/lib/mailfw/salt_helper.py:
        - source: salt://mailfw/agent/files/salt_helper.py
      - {{ os.unit_directory }}/mailfw-agent.service:
        - source: salt://mailfw/agent/files/mailfw-agent.service
        - template: jinja
        - context:
            metrics_directory: {{ ("" if metrics is false else metrics_directory) | json }}
      - {{ os.unit_directory }}/mailfw-agent.socket:
        - source: salt://mailfw/agent/files/mailfw-agent.socket
        - template: jinja
        - context:
            login_group: {{ os.dovecot_login_user if "dovecot" in roles else "" }}
    - mode: "0644"
    - require:
      - file: mailfw library is installed

{%- if metrics is false %}

mailfw agent writes no metrics:
  file.absent:
    - name: {{ (metrics_directory ~ "/mailfw.prom") | json }}
    - require:
      - service: mailfw agent is running
{%- endif %}

mailfw agent can be reached:
  service.running:
    - name: mailfw-agent.socket
    - enable: True
    - require:
      - service: mailfw rules are kept
      - file: mailfw agent can be started

mailfw agent is running:
  service.running:
    - name: mailfw-agent
    - enable: True
    - require:
      - service: mailfw agent can be reached
    - watch:
      - file: mailfw library is installed
      - file: mailfw agent can be started

# What it has missed while it was off, and what a new host has never heard. Also makes the host known to the master.
mailfw agent catches up with the fleet:
  schedule.present:
    - function: mailfw.catch_up
    - minutes: 10
    - splay: 60
    - return_job: False
    # The agent has it run at once when the master is back; a run that hangs must not keep the next one away.
    - jid_include: False
    - require:
      - service: mailfw agent is running

mailfw agent is known to the fleet:
  mailfw.caught_up:
    - require:
      - service: mailfw agent is running
    - onchanges:
      - mailfw: mailfw settings are saved
      - service: mailfw agent is running
