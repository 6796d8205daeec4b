"""
Bring a mail host's firewall to what its ``mailfw`` pillar says.

``state.apply mailfw`` uses these in order: check the settings, load the rules, save the settings for the agent.
:py:func:`reactor_configured` is for the master.

What is to last is declared with :py:func:`trusted`, :py:func:`blocked` and :py:func:`absent`; the pillar's lists of
networks are for larger ones.
"""

from salt.exceptions import CommandExecutionError, SaltException

__virtualname__ = "mailfw"


def __virtual__():
    return __virtualname__


def _result(name, result=True, comment="", changes=None):
    return {"name": name, "result": result, "comment": comment, "changes": changes or {}}


def settings_valid(name):
    """
    Check the minion's ``mailfw`` pillar, and fail with everything that is wrong with it. Changes nothing.

    name
        A sentence for people.

    .. code-block:: yaml

        mailfw settings are valid:
          mailfw.settings_valid: []
    """
    try:
        mode = __salt__["mailfw.settings"]()["protection"]["type"]
    except CommandExecutionError as err:
        return _result(name, False, str(err))
    return _result(name, comment=f"The mailfw pillar is valid; the mode is {mode}.")


def ruleset(name):
    """
    Load the rules that the pillar asks for, in one transaction, and write their files once the kernel has taken them.

    The change is shown as a diff of what the kernel lists. Rules that do not load change nothing, and nft says why.

    name
        A sentence for people.

    .. code-block:: yaml

        mailfw ruleset is loaded:
          mailfw.ruleset: []
    """
    testing = __opts__["test"]
    try:
        files = __salt__["mailfw.render"](saltenv=__env__)
        done = __salt__["mailfw.apply"](files=files, test=testing)
    except CommandExecutionError as err:
        return _result(name, False, str(err))
    changes = {kind: value for kind, value in done.items() if value}
    opening = __salt__["mailfw.opening"]()
    note = f" NOT IN FORCE: this host is {opening}" if opening else ""
    if not changes:
        return _result(name, comment=f"The ruleset is loaded and its files are as they should be.{note}")
    if testing:
        return _result(name, None, f"The ruleset would be changed.{note}", changes)
    return _result(name, comment=f"The ruleset was changed.{note}", changes=changes)


def settings_saved(name, login_users=("dovecot",)):
    """
    Save the minion's settings on the host, for the agent and the operator's verbs.

    name
        A sentence for people.

    login_users
        The users as which Dovecot runs the login hook. Default: ``dovecot``.

    .. code-block:: yaml

        mailfw settings are saved:
          mailfw.settings_saved: []
    """
    return _replaced(name, "settings file", __salt__["mailfw.save_settings"], login_users=login_users)


def caught_up(name):
    """
    Have the agent learn the logins that it has missed from the master. Without a master nothing is lost: the minion's
    scheduler tries again every ten minutes.

    name
        A sentence for people.

    .. code-block:: yaml

        mailfw agent is known to the fleet:
          mailfw.caught_up: []
    """
    if __opts__["test"]:
        return _result(name, None, "The agent would ask the master for the logins that it has missed.")
    try:
        return _result(name, comment=__salt__["mailfw.catch_up"]())
    except CommandExecutionError as err:
        return {**_result(name, comment="The agent goes on without the fleet's logins."), "warnings": [str(err)]}


def login_hook_run(name, ours="/etc/dovecot/conf.d/99-mailfw.conf", libexec="/usr/lib/dovecot"):
    """
    Say whether every login runs mailfw's hook, now that Dovecot is configured; warn of protocols where none does.

    name
        A sentence for people.

    ours
        mailfw's file of Dovecot's configuration. Default: ``/etc/dovecot/conf.d/99-mailfw.conf``.

    libexec
        Where Dovecot's programs are. Default: ``/usr/lib/dovecot``.

    .. code-block:: yaml

        mailfw login hook is run after each login:
          mailfw.login_hook_run: []
    """
    if __opts__["test"]:
        return _result(name, comment="Whether each login runs the hook is looked at when it is there.")
    missing = __salt__["mailfw.logins_without_hook"](libexec)
    if not missing:
        return _result(name, comment="Each login runs the hook.")
    reasons = __salt__["mailfw.login_services"](ours, libexec=libexec)["left"]
    warnings = [
        f"logins over {protocol} do not run mailfw's hook: "
        + reasons.get(protocol, f"something that Dovecot reads after mailfw's file has them run '{runs}'")
        for protocol, runs in missing.items()
    ]
    comment = "These are trusted a moment after their OK, by Dovecot's reports, if mailfw:reports is on."
    return {**_result(name, comment=comment), "warnings": warnings}


def reactor_configured(name):
    """
    Configure the master on this host: the reactor for logins, what mail hosts may ask of it, and the fleet's keys. The
    lists in the master's main configuration file stay in force. The master must be restarted after a change.

    name
        A sentence for people.

    .. code-block:: yaml

        mailfw master knows the fleet:
          mailfw.reactor_configured: []
    """
    return _replaced(name, "master configuration", __salt__["mailfw.configure_master"])


def runner_synced(name):
    """
    Bring mailfw's runner, and the package that it imports, to the master on this host.

    name
        A sentence for people.

    .. code-block:: yaml

        mailfw runner is synced:
          mailfw.runner_synced: []
    """
    if __opts__["test"]:
        return _result(name, None, "The master's extension modules would be synced, if any has changed.")
    synced = __salt__["saltutil.runner"]("saltutil.sync_all")
    if not isinstance(synced, dict):
        return _result(name, False, f"The master's extension modules could not be synced: {synced!r:.200}")
    changes = {kind: modules for kind, modules in synced.items() if modules}
    return _result(name, comment="The master's extension modules are synced.", changes=changes)


def _replaced(name, what, replace, **arguments):
    """Report on a file that ``replace`` writes. It holds the fleet's keys, so it is not shown."""
    testing = __opts__["test"]
    try:
        changed = replace(test=testing, **arguments)
    except CommandExecutionError as err:
        return _result(name, False, str(err))
    if not changed:
        return _result(name, comment=f"The {what} is as it should be.")
    verb = "would be" if testing else "was"
    return _result(name, None if testing else True, f"The {what} {verb} replaced.", {what: "replaced"})


def trusted(name, period="366d", services=None, reason="by a state"):
    """
    Keep an address or a network trusted on this host. It is trusted anew when less than half of the period is left, so
    that it ends by itself once the state is gone.

    name
        The address or network.

    period
        For how long, at most ``366d``, which is the default.

    services
        The services or ports, as a list. Default: every login port of the host.

    reason
        Why, for the journal and ``mailfw.explain``; at most 90 bytes.

    .. code-block:: yaml

        192.0.2.1:
          mailfw.trusted:
            - period: 30d
            - services: [submission, submissions]
    """
    wanted = {"period": period, "services": services}
    return _kept(name, "trusted", "trust", wanted, reason)


def blocked(name, period=None, reason="by a state"):
    """
    Keep an address or a network blocked from every login port of this host, and end its sessions when it is not yet.

    name
        The address or network.

    period
        For how long; it is blocked anew when less than half of it is left. Default: until it is unblocked.

    reason
        Why, for the journal and ``mailfw.explain``; at most 90 bytes.

    .. code-block:: yaml

        198.51.100.0/24:
          mailfw.blocked:
            - reason: guesses passwords
    """
    return _kept(name, "blocked", "block", {"period": period}, reason)


def absent(name, reason="by a state"):
    """
    Have an address or a network neither trusted nor banned nor blocked on this host, but by the lists of the pillar.

    name
        The address or network.

    reason
        Why, for the journal; at most 90 bytes.

    .. code-block:: yaml

        192.0.2.1:
          mailfw.absent: []
    """
    try:
        found = {kind: left for kind, left in __salt__["mailfw.remaining"](name).items() if left}
        if not found:
            return _result(name, comment=f"{name} is neither trusted nor banned nor blocked.")
        changes = {kind: {"old": left, "new": {}} for kind, left in found.items()}
        if __opts__["test"]:
            return _result(name, None, f"{name} would be neither trusted nor banned nor blocked.", changes)
        __salt__["mailfw.clear"](name, reason=reason)
        if "blocked" in found:
            __salt__["mailfw.unblock"](name, reason=reason)
    except SaltException as err:
        return _result(name, False, str(err))
    return _result(name, comment=f"{name} is neither trusted nor banned nor blocked any more.", changes=changes)


def _kept(name, kind, verb, wanted, reason):
    """Report on what a verb makes of an address, unless it is that for long enough already."""
    try:
        lacking = __salt__["mailfw.lacking"](kind, name, **wanted)
        if not lacking:
            return _result(name, comment=f"{name} is {kind}.")
        changes = {kind: {"old": lacking, "new": dict.fromkeys(lacking, wanted["period"] or "forever")}}
        if __opts__["test"]:
            return _result(name, None, f"{name} would be {kind}.", changes)
        __salt__[f"mailfw.{verb}"](name, reason=reason, **wanted)
    except SaltException as err:
        return _result(name, False, str(err))
    return _result(name, comment=f"{name} is {kind} now.", changes=changes)
