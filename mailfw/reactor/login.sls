# Reactor for the event mailfw/login. No field of it is authority: the runner takes nothing that is not signed.
# Signed messages are printable ASCII. Other text is dropped here, since not all of it survives YAML.
{%- set sent = data["data"] if data["data"] is mapping else {} %}
{%- set message = sent.get("message") %}
{%- if message is string and message | length <= 65536 and message.isascii() and message.isprintable() %}
mailfw announces logins to the fleet:
  runner.mailfw.announce:
    - args:
      - message: {{ message | json }}
{%- endif %}
