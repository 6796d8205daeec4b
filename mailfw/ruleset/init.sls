{%- from "mailfw/map.jinja" import os with context %}

include:
  - mailfw.sync

mailfw settings are valid:
  mailfw.settings_valid:
    - require:
      - saltutil: mailfw extension modules are synced

mailfw packages are installed:
  pkg.installed:
    - pkgs: {{ os.packages | json }}
    - require:
      - mailfw: mailfw settings are valid

mailfw ruleset is loaded:
  mailfw.ruleset:
    - require:
      - pkg: mailfw packages are installed

mailfw settings are saved:
  mailfw.settings_saved:
    - login_users: [{{ os.dovecot_login_user }}]
    - require:
      - mailfw: mailfw ruleset is loaded

mailfw rules can be loaded at boot:
  file.managed:
    - names:
      - /usr/lib/mailfw/load.nft:
        - source: salt://mailfw/ruleset/files/load.nft
      - {{ os.unit_directory }}/mailfw.service:
        - source: salt://mailfw/ruleset/files/mailfw.service
    - mode: "0644"
    - makedirs: True
    - require:
      - mailfw: mailfw ruleset is loaded

mailfw rules are loaded at boot:
  service.enabled:
    - name: mailfw
    - require:
      - file: mailfw rules can be loaded at boot
