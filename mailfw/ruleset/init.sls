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

mailfw library is installed:
  file.recurse:
    - name: /usr/lib/mailfw/mailfwlib
    - source: salt://_utils/mailfwlib
    - saltenv: base
    - clean: True
    - include_pat: "*.py"
    - file_mode: "0644"
    - dir_mode: "0755"
    - require:
      - mailfw: mailfw settings are saved

mailfw rules can be loaded without Salt:
  file.managed:
    - names:
      - /usr/lib/mailfw/mailfw-rules:
        - source: salt://mailfw/ruleset/files/mailfw-rules
        - mode: "0755"
      - /usr/sbin/mailfw-open:
        - source: salt://mailfw/ruleset/files/mailfw-open
        - mode: "0755"
      - /usr/lib/mailfw/load.nft:
        - source: salt://mailfw/ruleset/files/load.nft
      - /usr/lib/mailfw/unload.nft:
        - source: salt://mailfw/ruleset/files/unload.nft
      - {{ os.unit_directory }}/mailfw.service:
        - source: salt://mailfw/ruleset/files/mailfw.service
    - mode: "0644"
    - makedirs: True
    - require:
      - file: mailfw library is installed

# At boot, and after whatever flushes the rules on behalf of nftables.service.
mailfw rules are kept:
  service.running:
    - name: mailfw
    - enable: True
    - require:
      - file: mailfw rules can be loaded without Salt
