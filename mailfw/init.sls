# Guards the login ports of a mail host. Everything else is included from here.
{%- if opts.test and "mailfw.apply" not in salt %}

mailfw is new to this minion:
  test.show_notification:
    - text: >-
        What would change is not known yet: mailfw's modules are not on this minion, and test=True must not bring them.
        A run without test=True brings them first; so does saltutil.sync_all, after which test=True shows the changes.
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
