# Reactor for the event mailfw/login. No field of it is authority: the runner takes nothing that is not signed.
{%- set sent = data["data"] if data["data"] is mapping else {} %}
{%- if sent.get("message") is string and sent["message"] | length <= 65536 %}
mailfw announces logins to the fleet:
  runner.mailfw.announce:
    - args:
      - message: {{ sent["message"] | json }}
{%- endif %}
