{%- from "mailfw/map.jinja" import os, metrics_directory with context %}

mailfw agent does not catch up:
  schedule.absent:
    - name: mailfw agent catches up with the fleet

mailfw agent cannot be reached:
  service.dead:
    - name: mailfw-agent.socket
    - enable: False

mailfw agent is not running:
  service.dead:
    - name: mailfw-agent
    - enable: False
    - require:
      - service: mailfw agent cannot be reached

mailfw agent is removed:
  file.absent:
    - names:
      - {{ os.unit_directory }}/mailfw-agent.service
      - {{ os.unit_directory }}/mailfw-agent.socket
      - /usr/lib/mailfw/mailfw-agent
      - /usr/lib/mailfw/salt_helper.py
      - /usr/lib/mailfw/mailfwlib
      - /run/mailfw
      - {{ (metrics_directory ~ "/mailfw.prom") | json }}
    - require:
      - service: mailfw agent is not running
