# The role's rules are templates beside this file; mailfw.ruleset loads the one of the mode.
# Here: the hook that Dovecot runs after each login, and the one file of Dovecot's configuration that names it.
{%- from "mailfw/map.jinja" import os with context %}

include:
  - mailfw.ruleset
  - mailfw.agent

mailfw login hook is installed:
  file.managed:
    - names:
      - /usr/lib/mailfw/login-hook:
        - source: salt://mailfw/dovecot/files/login-hook.sh
        - mode: "0755"
      - /usr/lib/mailfw/login_hook.py:
        - source: salt://mailfw/dovecot/files/login_hook.py
        - mode: "0644"
    - makedirs: True
    - require:
      - mailfw: mailfw settings are saved

mailfw login hook is run by Dovecot:
  file.managed:
    - name: {{ os.dovecot_conf_directory }}/99-mailfw.conf
    - source: salt://mailfw/dovecot/files/99-mailfw.conf.jinja
    - template: jinja
    - mode: "0644"
    - context:
        login_user: {{ os.dovecot_login_user }}
        libexec: {{ os.dovecot_libexec }}
    - require:
      - file: mailfw login hook is installed
      - service: mailfw agent is running

mailfw login hook is known to Dovecot:
  cmd.run:
    # A configuration that Dovecot refuses would stop it at its next restart, so it does not stay.
    - name: |
        if ! doveconf -n >/dev/null; then
          rm {{ os.dovecot_conf_directory }}/99-mailfw.conf
          echo "Dovecot refuses its configuration, so mailfw's part of it was removed again." >&2
          exit 1
        fi
        systemctl try-reload-or-restart dovecot
    - onchanges:
      - file: mailfw login hook is run by Dovecot
