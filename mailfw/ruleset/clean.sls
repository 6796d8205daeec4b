{%- from "mailfw/map.jinja" import os with context %}

mailfw rules are not kept:
  service.dead:
    - name: mailfw
    - enable: False

mailfw ruleset is not loaded:
  cmd.run:
    - name: nft delete table inet mailfw
    - onlyif: nft -t list table inet mailfw
    - require:
      - service: mailfw rules are not kept

mailfw files are removed:
  file.absent:
    - names:
      - {{ os.unit_directory }}/mailfw.service
      - /usr/sbin/mailfw-open
      - /etc/nftables.d/mailfw
      - /var/lib/mailfw
      - /run/mailfw
      - /etc/mailfw
      - /usr/lib/mailfw
    - require:
      - cmd: mailfw ruleset is not loaded

mailfw leaves no directory that it made:
  cmd.run:
    - name: rmdir /etc/nftables.d
    - onlyif: find /etc/nftables.d -maxdepth 0 -empty | grep -q .
    - require:
      - file: mailfw files are removed
