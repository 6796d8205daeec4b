# Guards the login ports of a mail host. Everything else is included from here.
{%- if opts.test and "mailfw.apply" not in salt %}

mailfw is new to this minion:
  test.configurable_test_state:
    - changes: True
    - result: True
    - comment: >-
        mailfw's modules are not on this minion yet, and test=True must not bring them. A run without test=True
        syncs them first. To see what it would change, run saltutil.sync_all and then this again.
{%- else %}
{%- from "mailfw/map.jinja" import roles with context %}

include:
  - mailfw.ruleset
{%- for role in ("postfix", "dovecot") if role in roles %}
  - mailfw.{{ role }}
{%- endfor %}
{%- if roles %}
  - mailfw.agent
{%- endif %}
{%- endif %}
