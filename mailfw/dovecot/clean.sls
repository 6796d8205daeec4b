{%- from "mailfw/map.jinja" import os with context %}

mailfw login hook is not run by Dovecot:
  file.absent:
    - names:
      - {{ os.dovecot_conf_directory }}/99-mailfw.conf
      - /etc/mailfw/dovecot-reports.conf

mailfw login hook is not known to Dovecot:
  cmd.run:
    - name: systemctl try-reload-or-restart dovecot
    - onchanges:
      - file: mailfw login hook is not run by Dovecot

mailfw login hook is removed:
  file.absent:
    - names:
      - /usr/lib/mailfw/hook
      - /usr/lib/mailfw/login-hook
      - /usr/lib/mailfw/login_hook.py
      - /usr/lib/mailfw/as-mail-user
    - require:
      - cmd: mailfw login hook is not known to Dovecot
