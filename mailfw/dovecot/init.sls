# The role's rules are templates beside this file; mailfw.ruleset loads the one of the mode.
# Here: the hook that Dovecot runs after each login, and the one file of Dovecot's configuration that names it; and the
# reports of all logins, Postfix's included, on hosts whose Dovecot has no policy server yet: it can have one only.
{%- from "mailfw/map.jinja" import os, reports with context %}
{%- set report_port = reports.get("port", 4145) if reports is mapping else 4145 %}

include:
  - mailfw.ruleset
  - mailfw.agent

# The rules are loaded all the same: only who logs in is not known.
mailfw finds Dovecot:
  cmd.run:
    - name: |
        echo "There is no Dovecot on this host. Where there is to be none, its pillar needs mailfw:roles: [postfix]." >&2
        exit 1
    - unless: command -v doveconf
    - require:
      - mailfw: mailfw settings are saved

mailfw login hook is there:
  file.managed:
    - names:
      - /usr/lib/mailfw/hook/login-hook:
        - source: salt://mailfw/dovecot/files/login-hook.sh
        - mode: "0755"
      - /usr/lib/mailfw/hook/login_hook.py:
        - source: salt://mailfw/dovecot/files/login_hook.py
        - mode: "0644"
      - /usr/lib/mailfw/hook/as-mail-user:
        - source: salt://mailfw/dovecot/files/as-mail-user
        - mode: "0755"
    - makedirs: True
    - require:
      - cmd: mailfw finds Dovecot

# Salt gives a file its name first and then its mode: whoever logs in just then would be refused by Dovecot.
mailfw login hook is installed:
  cmd.run:
    - name: |
        for file in login-hook login_hook.py as-mail-user; do
          cp -p hook/$file hook/$file.new && mv hook/$file.new $file || exit 1
        done
    - cwd: /usr/lib/mailfw
    - unless: for file in login-hook login_hook.py as-mail-user; do cmp -s hook/$file $file || exit 1; done
    - require:
      - file: mailfw login hook is there

{%- if reports is false %}

mailfw agent hears no reports of Dovecot:
  file.absent:
    - name: /etc/mailfw/dovecot-reports.conf
{%- else %}

mailfw agent hears reports of Dovecot:
  file.managed:
    - name: /etc/mailfw/dovecot-reports.conf
    - source: salt://mailfw/dovecot/files/reports.conf.jinja
    - template: jinja
    - mode: "0600"
    - show_changes: False
    - context:
        port: {{ report_port }}
    # Dovecot 2.4 writes it without auth_policy_, in a block of that name.
    - unless: >-
        doveconf -n | sed -n 's/^ *\(auth_policy_\)\{0,1\}server_url = //p'
        | grep -vx 'http://127\.0\.0\.1:{{ report_port }}/' | grep .
    - require:
      - cmd: mailfw finds Dovecot
{%- endif %}

mailfw login hook is run by Dovecot:
  file.managed:
    - name: {{ os.dovecot_conf_directory }}/99-mailfw.conf
    - source: salt://mailfw/dovecot/files/99-mailfw.conf.jinja
    - template: jinja
    - mode: "0644"
    - context:
        ours: {{ os.dovecot_conf_directory }}/99-mailfw.conf
        login_user: {{ os.dovecot_login_user }}
        libexec: {{ os.dovecot_libexec }}
    - require:
      - cmd: mailfw login hook is installed
      - service: mailfw agent is running

mailfw login hook is known to Dovecot:
  cmd.run:
    # A configuration that Dovecot refuses would stop it at its next restart, so it does not stay.
    - name: |
        if ! doveconf -n >/dev/null; then
          rm -f {{ os.dovecot_conf_directory }}/99-mailfw.conf /etc/mailfw/dovecot-reports.conf
          echo "Dovecot refuses its configuration, so mailfw's part of it was removed again." >&2
          exit 1
        fi
        systemctl try-reload-or-restart dovecot
    - onchanges:
      - file: mailfw login hook is run by Dovecot
      - file: mailfw agent hears {{ "no " if reports is false }}reports of Dovecot

mailfw login hook is run after each login:
  mailfw.login_hook_run:
    - ours: {{ os.dovecot_conf_directory }}/99-mailfw.conf
    - libexec: {{ os.dovecot_libexec }}
    - require:
      - file: mailfw login hook is run by Dovecot
      - cmd: mailfw login hook is known to Dovecot
