{%- from "mailfw/map.jinja" import os with context %}

mailfw rules are not loaded at boot:
  service.dead:
    - name: mailfw
    - enable: False

mailfw ruleset is not loaded:
  cmd.run:
    - name: nft delete table inet mailfw
    - onlyif: nft -t list table inet mailfw
    - require:
      - service: mailfw rules are not loaded at boot

mailfw files are removed:
  file.absent:
    - names:
      - {{ os.unit_directory }}/mailfw.service
      - /etc/nftables.d/mailfw
      - /etc/mailfw
      - /usr/lib/mailfw
    - require:
      - cmd: mailfw ruleset is not loaded
