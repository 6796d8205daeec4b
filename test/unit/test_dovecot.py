"""Where mailfw's hook goes among a host's own post-login scripts, for what Dovecot 2.3 and 2.4 print."""

import pytest

from mailfwlib import dovecot

OWN = "imap imap-postlogin"
#: Dovecot 2.3 prints everything, 2.4 what is not the default.
V23 = """\
# 2.3.19.1 (9b53102964): /etc/dovecot/dovecot.conf
base_dir = /run/dovecot
default_internal_user = dovecot
mail_access_groups = {access}
mail_gid =
mail_uid = {mail_uid}
namespace inbox {{
  mailbox "Sent Messages" {{
    special_use = \\Sent
  }}
}}
passdb {{
  args = "a = b {{"
}}
service imap {{
  executable = {imap}
  unix_listener login/imap {{
    mode = 0666
  }}
}}
service imap-postlogin {{
  chroot = {chroot}
  executable = {script}
  extra_groups = {groups}
  group = {group}
  unix_listener imap-postlogin {{
    mode = 0600
    user =
  }}
  user = {user}
}}
service managesieve {{
  executable = managesieve
}}
service pop3 {{
  executable = {pop3}
}}
"""
V24 = """\
# 2.4.1-4 (7d8c0e5759): /etc/dovecot/dovecot.conf
dovecot_config_version = 2.4.0
mail_access_groups = {access}
mail_uid = {mail_uid}
namespace inbox {{
  mailbox "Sent Messages" {{
    special_use = "\\\\Sent"
  }}
}}
service imap {{
  executable = {imap}
}}
service pop3 {{
  executable = {pop3}
}}
service managesieve {{
}}
service imap-postlogin {{
  chroot = {chroot}
  executable = "{script}"
  extra_groups = {groups}
  group = {group}
  user = {user}
  unix_listener imap-postlogin {{
  }}
}}
"""
HOOK = "script-login /usr/lib/mailfw/login-hook"


@pytest.fixture(params=[V23, V24], ids=["2.3", "2.4"])
def configured(request):
    """Return a function that gives a host's configuration."""
    nothing = dict.fromkeys(("access", "mail_uid", "chroot", "script", "groups", "group", "user"), "")

    def configuration(**settings):
        return dovecot.parse(request.param.format(**{**nothing, "imap": "imap", "pop3": "pop3", **settings}))

    return configuration


def planned(found, protocols=dovecot.PROTOCOLS):
    def primary_group(user):
        return {"vmail": "5000"}[user]

    return dovecot.plan(found, protocols, "/usr/lib/dovecot", "dovecot", primary_group)


def imap_service(found):
    return planned(found).services["imap-postlogin"]


def in_force(text, services):
    """Return a configuration with mailfw's file, which comes last."""
    blocks = "".join(
        f"service {name} {{\n" + "".join(f"{key} = {value}\n" for key, value in one.items()) + "}\n"
        for name, one in services.items()
    )
    return dovecot.parse(
        f"{text}{blocks}service mailfw-login {{\nexecutable = {HOOK}\nunix_listener mailfw-login {{\n}}\n}}\n"
    )


def test_blocks_are_read_with_quotes_and_variables(configured):
    found = configured(imap=OWN, script="script-login /a", user="$default_internal_user")
    assert found.blocks["service imap-postlogin"].settings["executable"] == "script-login /a"
    assert found.blocks["service imap-postlogin"].blocks.keys() == {"unix_listener imap-postlogin"}
    assert found.blocks["namespace inbox"].blocks["mailbox Sent Messages"].settings == {"special_use": "\\Sent"}


def test_without_own_scripts_every_protocol_asks_mailfws_service(configured):
    assert planned(configured()) == (
        {protocol: {"executable": f"{protocol} mailfw-login"} for protocol in dovecot.PROTOCOLS},
        {},
    )


def test_only_protocols_that_are_installed_are_configured(configured):
    assert planned(configured(), ["imap"]).services.keys() == {"imap"}


def test_what_a_protocol_runs_besides_is_kept(configured):
    found = planned(configured(imap="/usr/bin/nice -n 5 /usr/lib/dovecot/imap -D"))
    assert found.services["imap"] == {"executable": "/usr/bin/nice -n 5 /usr/lib/dovecot/imap -D mailfw-login"}


@pytest.mark.parametrize("user", ["", "root", "dovecot", "$default_internal_user", "$SET:default_internal_user"])
def test_own_scripts_come_after_the_hook(configured, user):
    found = planned(configured(imap=OWN, script="script-login /own/one /own/two", user=user))
    assert found.services["imap-postlogin"] == {"executable": f"{HOOK} /own/one /own/two"}
    assert "imap" not in found.services
    assert found.services["pop3"] == {"executable": "pop3 mailfw-login"}


def test_own_scripts_may_serve_several_protocols(configured):
    found = planned(configured(imap=OWN, pop3="pop3 /run/dovecot/imap-postlogin", script="script-login /own"))
    assert found.services.keys() == {"imap-postlogin", "managesieve"}


def test_a_script_among_dovecots_own_programs_is_found(configured):
    found = imap_service(configured(imap=OWN, script="/usr/lib/dovecot/script-login own"))
    assert found["executable"] == "/usr/lib/dovecot/script-login /usr/lib/mailfw/login-hook /usr/lib/dovecot/own"


@pytest.mark.parametrize(
    ("settings", "drop"),
    [
        ({}, "--reuid=vmail --regid=5000 --clear-groups"),
        ({"group": "mail"}, "--reuid=vmail --regid=mail --clear-groups"),
        ({"groups": "adm,mail"}, "--reuid=vmail --regid=5000 --groups=adm,mail"),
        ({"groups": "adm mail"}, "--reuid=vmail --regid=5000 --groups=adm,mail"),
    ],
)
def test_own_scripts_keep_their_user_and_groups(configured, settings, drop):
    found = imap_service(configured(imap=OWN, script="script-login /own", user="vmail", **settings))
    assert found == {"user": "root", "executable": f"{HOOK} /usr/bin/setpriv {drop} /own"}


@pytest.mark.parametrize(("mail_uid", "shown"), [("", "-"), ("vmail", "vmail")])
def test_own_scripts_run_as_the_mail_user_where_they_did(configured, mail_uid, shown):
    found = imap_service(configured(imap=OWN, script="script-login -d /own", mail_uid=mail_uid))
    assert found == {"executable": f"{HOOK} /usr/lib/mailfw/as-mail-user {shown} - /own"}


LEFT = {
    "another program": ({"imap": "/opt/imap-wrapper"}, "'/opt/imap-wrapper', where imap itself is not found"),
    "nobody listens": ({"imap": "imap nowhere"}, "no service listens on 'nowhere'"),
    "no script-login": ({"script": "/opt/my-login /own"}, "not script-login with scripts"),
    "no script": ({"script": "script-login -d"}, "not script-login with scripts"),
    "unknown option": ({"script": "script-login -x /own"}, "not script-login with scripts"),
    "chroot": ({"script": "script-login /own", "chroot": "/srv"}, "has a chroot"),
    "unknown user": ({"script": "script-login /own", "user": "nobody-here"}, "'nobody-here', which does not exist"),
    "access groups": ({"script": "script-login -d /own", "access": "shared"}, "mail_access_groups"),
}


@pytest.mark.parametrize(("settings", "reason"), LEFT.values(), ids=LEFT)
def test_what_the_hook_cannot_precede_is_left_alone_and_said(configured, settings, reason):
    found = planned(configured(**{"imap": OWN, **settings}))
    assert reason in found.left["imap"]
    assert found.services.keys() == {"pop3", "managesieve"}


@pytest.mark.parametrize("text", [V23, V24], ids=["2.3", "2.4"])
@pytest.mark.parametrize("script", ["script-login /own", "script-login -d /own"])
def test_with_mailfws_file_each_login_runs_the_hook(text, script):
    nothing = dict.fromkeys(("access", "mail_uid", "chroot", "groups", "group", "user"), "")
    text = text.format(imap=OWN, pop3="pop3", script=script, **nothing)
    before = dovecot.parse(text)
    assert dovecot.without_hook(before, dovecot.PROTOCOLS) == {
        "imap": script,
        "pop3": "pop3",
        "managesieve": "managesieve",
    }
    services = planned(before).services
    assert dovecot.without_hook(in_force(text, services), dovecot.PROTOCOLS) == {}
    del services["pop3"]
    assert dovecot.without_hook(in_force(text, services), dovecot.PROTOCOLS) == {"pop3": "pop3"}


@pytest.mark.parametrize("rubbish", ["", "}\n}\n", "a {\n", "= {", "service {\n}", "x = \"\ny = '\n"])
def test_rubbish_is_no_configuration_and_no_error(rubbish):
    assert planned(dovecot.parse(rubbish)).services["imap"] == {"executable": "imap mailfw-login"}
