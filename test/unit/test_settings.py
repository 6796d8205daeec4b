import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import rules, settings
from unit import arbitrary, rendering

SECRET = "0123456789abcdef" * 2


def problems(pillar):
    with pytest.raises(settings.SettingsError) as caught:
        settings.resolve(pillar)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def attempt(pillar):
    """Return (settings, []) or (None, problems)."""
    try:
        return settings.resolve(pillar), []
    except settings.SettingsError as err:
        return None, err.problems


def options(schema=settings.SCHEMA, path="mailfw"):
    for key, entry in schema.items():
        if isinstance(entry, dict):
            yield from options(entry, f"{path}:{key}")
        else:
            yield f"{path}:{key}", entry


@pytest.mark.parametrize("pillar", [None, {}, {"autoban": {}}, {"protection": {"services": {}}}])
def test_defaults_are_those_of_the_specification(pillar):
    found = settings.resolve(pillar)
    assert found["protection"] == {"type": "autoban", "services": {}}
    assert found["autoban"] == {
        "rate": {"count": 10, "unit": "minute"},
        "burst": 20,
        "period": 3600,
        "ipv6_prefix": 64,
        "networks": False,
    }
    assert found["trusted"] == {
        "period": 86400,
        "timeout": 5 * 3600,
        "ipv6_prefix": 64,
        "networks_ipv4": [],
        "networks_ipv6": [],
        "never": [],
        "private": False,
        "users": "hash",
        "per_user": 50,
    }
    assert found["exempt"] == found["blocked"] == {"networks_ipv4": [], "networks_ipv6": []}
    assert found["reaction"] == {"banned": "drop", "blocked": "drop", "untrusted": "hold"}
    assert found["fleet"] == {"keys": []}
    assert found["log"] == {"rate": {"count": 10, "unit": "minute"}, "group": None}
    assert found["sizes"] == {
        "trusted": 2_000_000,
        "banned": 65536,
        "blocked": 65536,
        "rates": 65536,
        "waiting": 65536,
        "observed": 65536,
    }
    assert found["mark"] == 0x03000000
    assert found["reports"] == {"port": 4145}
    assert found["roles"] == ["postfix", "dovecot"]
    assert found["enforce"] is True


def test_ports_are_those_of_the_specification():
    assert {(one["name"], one["port"], one["role"], one["login"]) for one in settings.resolve({})["services"]} == {
        ("smtp", 25, "postfix", False),
        ("submission", 587, "postfix", True),
        ("submissions", 465, "postfix", True),
        ("imap", 143, "dovecot", True),
        ("imaps", 993, "dovecot", True),
        ("pop3", 110, "dovecot", True),
        ("pop3s", 995, "dovecot", True),
        ("sieve", 4190, "dovecot", True),
    }


def test_every_key_has_a_meaning_and_a_default_that_is_accepted():
    for path, option in options():
        assert len(option.meaning.split()) > 1, path
        option.parse(option.default)


def test_everything_that_may_be_set():
    found = settings.resolve(
        {
            "protection": {"type": "protected", "services": {"sieve": "private", "imap": "public"}},
            "enforce": False,
            "roles": ["dovecot", "postfix", "dovecot"],
            "autoban": {
                "rate": "5/hour",
                "burst": 1,
                "period": "2d",
                "ipv6_prefix": 56,
                "networks": {"ipv6_prefix": 32},
            },
            "trusted": {
                "period": 60,
                "timeout": "1h30m",
                "ipv6_prefix": 128,
                "networks_ipv4": ["192.0.2.128/25", "192.0.2.0/25", "192.0.2.7", "10.0.0.0/8"],
                "networks_ipv6": ["2001:db8::/33", "2001:db8:8000::/33"],
                "never": ["192.0.2.1", "2001:db8::/48"],
            },
            "exempt": {"networks_ipv4": ["192.0.2.9"]},
            "blocked": {"networks_ipv6": ("2001:db8:1::/48",)},
            "reaction": {"banned": "reject", "blocked": "reject", "untrusted": "drop"},
            "services": {"pop3": False, "submission": {"port": 2587}, "imap": {}, "sieve": {"port": None}},
            "log": {"rate": "1/second", "group": 65535},
            "sizes": {"trusted": 1, "observed": 2**24},
            "mark": 2**31 + 1,
            "fleet": {"keys": [SECRET]},
        }
    )
    assert found["roles"] == ["postfix", "dovecot"]
    assert found["autoban"]["networks"] == {
        "rate": {"count": 100, "unit": "minute"},
        "ipv4_prefix": 24,
        "ipv6_prefix": 32,
    }
    assert found["trusted"]["timeout"] == 5400
    assert found["trusted"]["networks_ipv4"] == ["10.0.0.0/8", "192.0.2.0/24"]
    assert found["trusted"]["networks_ipv6"] == ["2001:db8::/32"]
    assert found["trusted"]["never"] == ["192.0.2.1/32", "2001:db8::/48"]
    assert found["exempt"]["networks_ipv4"] == ["192.0.2.9/32"]
    assert found["blocked"]["networks_ipv6"] == ["2001:db8:1::/48"]
    assert found["fleet"] == {"keys": [SECRET]}
    assert {service["name"]: service["port"] for service in found["services"]} == {
        "smtp": 25,
        "submission": 2587,
        "submissions": 465,
        "imap": 143,
        "imaps": 993,
        "pop3s": 995,
        "sieve": 4190,
    }
    assert found["log"] == {"rate": {"count": 1, "unit": "second"}, "group": 65535}
    assert (found["sizes"]["trusted"], found["sizes"]["banned"], found["sizes"]["observed"]) == (1, 65536, 2**24)
    assert found["mark"] == 0x80000001
    assert json.loads(json.dumps(found)) == found


WRONG = [
    ({"autoban": {"rat": "10/minute"}}, "mailfw:autoban:rat: unknown key; did you mean rate?"),
    ({"protection": {"xyz": 1}}, "mailfw:protection:xyz: unknown key; expected one of type, services"),
    ({1: 2}, "mailfw:1: unknown key; expected one of protection, enforce, roles, services, autoban, trusted,"),
    ({"autoban": None}, "mailfw:autoban: None: expected a mapping with the keys rate, burst"),
    ({"trusted": ["192.0.2.1"]}, "mailfw:trusted: ['192.0.2.1']: expected a mapping with the keys period, timeout"),
    ({"protection": {"type": "paranoid"}}, "mailfw:protection:type: 'paranoid': expected one of autoban, protected"),
    ({"protection": {"type": ["autoban"]}}, "mailfw:protection:type: ['autoban']: expected one of autoban"),
    ({"protection": {"services": []}}, "mailfw:protection:services: []: expected a mapping of services to modes"),
    (
        {"protection": {"services": {"smtp": "public"}}},
        "mailfw:protection:services: 'smtp': expected one of submission, submissions, imap, imaps, pop3, pop3s, sieve",
    ),
    ({"protection": {"services": {143: "public"}}}, "mailfw:protection:services: 143: expected one of submission"),
    (
        {"protection": {"services": {"imap": "open"}}},
        "mailfw:protection:services:imap: 'open': expected one of autoban, protected, private, public",
    ),
    ({"enforce": "false"}, "mailfw:enforce: 'false': expected true or false"),
    ({"enforce": 0}, "mailfw:enforce: 0: expected true or false"),
    ({"roles": "postfix"}, "mailfw:roles: 'postfix': expected a list of roles"),
    ({"roles": None}, "mailfw:roles: None: expected a list of roles"),
    ({"roles": ["postfix", "exim"]}, "mailfw:roles[1]: 'exim': expected one of postfix, dovecot"),
    ({"roles": [{"postfix": None}]}, "mailfw:roles[0]: {'postfix': None}: expected one of postfix, dovecot"),
    (
        {"autoban": {"rate": "10/fortnight"}},
        "mailfw:autoban:rate: '10/fortnight': the unit must be second, minute, hour or day",
    ),
    ({"autoban": {"rate": "0/minute"}}, "mailfw:autoban:rate: '0/minute': expected a rate such as 10/minute"),
    ({"autoban": {"rate": 10}}, "mailfw:autoban:rate: 10: expected a rate such as 10/minute"),
    ({"autoban": {"burst": 0}}, "mailfw:autoban:burst: 0: expected a whole number from 1 to 10000"),
    ({"autoban": {"burst": "20"}}, "mailfw:autoban:burst: '20': expected a whole number from 1 to 10000"),
    ({"autoban": {"burst": True}}, "mailfw:autoban:burst: True: expected a whole number from 1 to 10000"),
    ({"autoban": {"period": "0s"}}, "mailfw:autoban:period: '0s': expected a duration such as 90m"),
    ({"autoban": {"period": -5}}, "mailfw:autoban:period: -5: expected a duration such as 90m"),
    ({"autoban": {"ipv6_prefix": 129}}, "mailfw:autoban:ipv6_prefix: 129: expected a whole number from 32 to 128"),
    ({"autoban": {"networks": True}}, "mailfw:autoban:networks: True: expected false or a mapping such as"),
    ({"autoban": {"networks": 0}}, "mailfw:autoban:networks: 0: expected false or a mapping such as"),
    (
        {"autoban": {"networks": {"rate": "x"}}},
        "mailfw:autoban:networks:rate: 'x': expected a rate such as 10/minute",
    ),
    (
        {"autoban": {"networks": {"ipv4_prefix": 32}}},
        "mailfw:autoban:networks:ipv4_prefix: 32: expected a whole number from 8 to 31",
    ),
    (
        {"autoban": {"networks": {"ipv5_prefix": 1}}},
        "mailfw:autoban:networks:ipv5_prefix: unknown key; did you mean ipv",
    ),
    ({"trusted": {"period": "400d"}}, "mailfw:trusted:period: '400d': expected a duration such as 90m"),
    ({"trusted": {"timeout": "5 hours"}}, "mailfw:trusted:timeout: '5 hours': expected a duration such as 90m"),
    ({"trusted": {"ipv6_prefix": 31}}, "mailfw:trusted:ipv6_prefix: 31: expected a whole number from 32 to 128"),
    (
        {"trusted": {"networks_ipv4": ["192.0.2.0/24", "192.0.2.1/24"]}},
        "mailfw:trusted:networks_ipv4[1]: '192.0.2.1/24': has host bits set: write 192.0.2.0/24 for the network",
    ),
    (
        {"exempt": {"networks_ipv4": ["2001:db8::/48"]}},
        "mailfw:exempt:networks_ipv4[0]: '2001:db8::/48': is an IPv6 network in a list for IPv4",
    ),
    (
        {"blocked": {"networks_ipv6": ["192.0.2.1"]}},
        "mailfw:blocked:networks_ipv6[0]: '192.0.2.1': is an IPv4 network in a list for IPv6",
    ),
    ({"blocked": {"networks_ipv4": "192.0.2.1"}}, "mailfw:blocked:networks_ipv4: '192.0.2.1': expected a list of IPv4"),
    ({"trusted": {"never": ["proxy"]}}, "mailfw:trusted:never[0]: 'proxy': expected a network such as"),
    ({"trusted": {"private": "yes"}}, "mailfw:trusted:private: 'yes': expected true or false"),
    ({"trusted": {"users": "on"}}, "mailfw:trusted:users: 'on': expected one of hash, plain, off"),
    ({"trusted": {"users": True}}, "mailfw:trusted:users: True: expected one of hash, plain, off"),
    ({"trusted": {"per_user": 0}}, "mailfw:trusted:per_user: 0: expected a whole number from 1 to 10000"),
    ({"trusted": {"per_user": False}}, "mailfw:trusted:per_user: False: expected a whole number from 1 to 10000"),
    ({"trusted": {"never": None}}, "mailfw:trusted:never: None: expected a list of addresses or networks"),
    ({"reaction": {"banned": "hold"}}, "mailfw:reaction:banned: 'hold': expected one of drop, reject"),
    ({"reaction": {"blocked": True}}, "mailfw:reaction:blocked: True: expected one of drop, reject"),
    ({"reaction": {"untrusted": "wait"}}, "mailfw:reaction:untrusted: 'wait': expected one of hold, reject, drop"),
    ({"services": []}, "mailfw:services: []: expected a mapping of services, such as {pop3: false, submission: {port:"),
    ({"services": None}, "mailfw:services: None: expected a mapping of services"),
    ({"services": {"smtp": {"port": 2525}}}, "mailfw:services: 'smtp': expected one of submission, submissions, imap"),
    ({"services": {587: False}}, "mailfw:services: 587: expected one of submission, submissions, imap, imaps, pop3"),
    ({"services": {"pop3": True}}, "mailfw:services:pop3: True: expected false or a mapping such as {port: 2587}"),
    ({"services": {"pop3": 0}}, "mailfw:services:pop3: 0: expected false or a mapping such as {port: 2587}"),
    ({"services": {"pop3": None}}, "mailfw:services:pop3: None: expected false or a mapping such as {port: 2587}"),
    ({"services": {"imap": 1143}}, "mailfw:services:imap: 1143: expected false or a mapping such as {port: 2587}"),
    (
        {"services": {"imap": {"port": 65536}}},
        "mailfw:services:imap:port: 65536: expected a whole number from 1 to 65535",
    ),
    (
        {"services": {"imap": {"port": False}}},
        "mailfw:services:imap:port: False: expected a whole number from 1 to 65535",
    ),
    ({"services": {"imap": {"ports": [1]}}}, "mailfw:services:imap:ports: unknown key; did you mean port?"),
    ({"log": True}, "mailfw:log: True: expected false or a mapping such as {rate: 10/minute}"),
    ({"log": None}, "mailfw:log: None: expected false or a mapping such as {rate: 10/minute}"),
    ({"log": 0}, "mailfw:log: 0: expected false or a mapping such as {rate: 10/minute}"),
    ({"log": {"rate": "10/week"}}, "mailfw:log:rate: '10/week': the unit must be second, minute, hour or day"),
    ({"log": {"rate": None}}, "mailfw:log:rate: None: expected a rate such as 10/minute"),
    ({"log": {"group": 65536}}, "mailfw:log:group: 65536: expected a whole number from 0 to 65535"),
    ({"log": {"group": False}}, "mailfw:log:group: False: expected a whole number from 0 to 65535"),
    ({"log": {"level": "info"}}, "mailfw:log:level: unknown key; expected one of rate, group"),
    ({"sizes": 65536}, "mailfw:sizes: 65536: expected a mapping with the keys trusted, banned, blocked, rates,"),
    ({"sizes": {"trusted": 0}}, "mailfw:sizes:trusted: 0: expected a whole number from 1 to 16777216"),
    ({"sizes": {"banned": "64k"}}, "mailfw:sizes:banned: '64k': expected a whole number from 1 to 16777216"),
    ({"sizes": {"blocked": 1e6}}, "mailfw:sizes:blocked: 1000000.0: expected a whole number from 1 to 16777216"),
    ({"sizes": {"rates": None}}, "mailfw:sizes:rates: None: expected a whole number from 1 to 16777216"),
    ({"sizes": {"waiting": 2**24 + 1}}, "mailfw:sizes:waiting: 16777217: expected a whole number from 1 to 16777216"),
    ({"sizes": {"observed": True}}, "mailfw:sizes:observed: True: expected a whole number from 1 to 16777216"),
    ({"sizes": {"older": 5}}, "mailfw:sizes:older: unknown key"),
    ({"reports": True}, "mailfw:reports: True: expected false or a mapping such as {port: 4145}"),
    ({"metrics": True}, "mailfw:metrics: True: expected false or a mapping such as {directory: "),
    ({"metrics": {"interval": 0}}, "mailfw:metrics:interval: 0: expected a duration such as 90m"),
    ({"reports": {"port": 80}}, "mailfw:reports:port: 80: expected a whole number from 1024 to 65535"),
    (
        {"doctor": {"names": ["imap.example.org"]}},
        "mailfw:doctor:names: ['imap.example.org']: expected a mapping of",
    ),
    (
        {"doctor": {"names": {"http": "www"}}},
        "mailfw:doctor:names: 'http': expected one of submission, submissions",
    ),
    ({"doctor": {"names": {"imap": "a b"}}}, "mailfw:doctor:names:imap: 'a b': expected a host name such as"),
    ({"doctor": {"names": {"imap": 7}}}, "mailfw:doctor:names:imap: 7: expected a host name such as"),
    ({"mark": 0}, "mailfw:mark: 0: expected two bits of 32, such as 0x03000000"),
    ({"mark": 7}, "mailfw:mark: 7: expected two bits of 32, such as 0x03000000"),
    ({"mark": 2**32}, "mailfw:mark: 4294967296: expected two bits of 32, such as 0x03000000"),
    ({"mark": -1}, "mailfw:mark: -1: expected two bits of 32, such as 0x03000000"),
    ({"mark": True}, "mailfw:mark: True: expected two bits of 32, such as 0x03000000"),
    ({"mark": "0x10"}, "mailfw:mark: '0x10': expected two bits of 32, such as 0x03000000"),
    ({"mark": None}, "mailfw:mark: None: expected two bits of 32, such as 0x03000000"),
    ({"fleet": {"keys": ["short"]}}, "mailfw:fleet:keys[0]: (not shown): expected a secret of at least 32 characters"),
    ({"fleet": {"keys": SECRET}}, "mailfw:fleet:keys: (not shown): expected a list of secrets"),
    ("autoban", "mailfw: (not shown): expected a mapping with the keys protection, enforce"),
    ([], "mailfw: (not shown): expected a mapping with the keys protection, enforce"),
]


@pytest.mark.parametrize(("pillar", "sentence"), WRONG, ids=[sentence.split(": ")[0] for _, sentence in WRONG])
def test_what_is_wrong_is_said_by_path(pillar, sentence):
    (problem,) = problems(pillar)
    assert problem.startswith(sentence)


@pytest.mark.parametrize(
    ("schema", "key", "lowest", "highest"),
    [
        (settings.SCHEMA["autoban"], "burst", 1, 10_000),
        (settings.SCHEMA["autoban"], "ipv6_prefix", 32, 128),
        (settings.SCHEMA["trusted"], "ipv6_prefix", 32, 128),
        (settings._NETWORK_COUNTING, "ipv4_prefix", 8, 31),
        (settings._NETWORK_COUNTING, "ipv6_prefix", 16, 63),
        (settings._LOGGING, "group", 0, 65535),
        *((settings.SCHEMA["sizes"], key, 1, 2**24) for key in settings.SCHEMA["sizes"]),
    ],
)
def test_bounds_of_numbers(schema, key, lowest, highest):
    for value in (lowest, highest):
        assert schema[key].parse(value) == value
    for value in (lowest - 1, highest + 1, float(lowest), str(lowest), None):
        with pytest.raises(ValueError, match=f"^expected a whole number from {lowest} to {highest}$"):
            schema[key].parse(value)


def test_every_key_is_checked():
    """No key may take just anything: an object is none of the accepted forms."""
    for path, option in options():
        with pytest.raises(ValueError, match="expected"):
            option.parse(object())
        assert any(sentence.startswith(path) for _, sentence in WRONG) or "networks_ipv" in path, path


def test_everything_wrong_is_said_at_once():
    pillar, sentences = {}, []
    for wrong, sentence in WRONG:
        if not isinstance(wrong, dict):
            continue
        (top, inner), *_ = wrong.items()
        if top not in pillar:
            pillar[top] = inner
            sentences.append(sentence)
        elif isinstance(inner, dict) and isinstance(pillar[top], dict) and not inner.keys() & pillar[top].keys():
            pillar[top].update(inner)
            sentences.append(sentence)
    found = problems(pillar)
    assert len(found) == len(sentences) > 10
    for sentence in sentences:
        assert any(problem.startswith(sentence) for problem in found), sentence


def test_each_bad_element_of_a_list_is_said():
    assert [problem.split(":")[2] for problem in problems({"trusted": {"never": ["x", "192.0.2.1", None]}})] == [
        "never[0]",
        "never[2]",
    ]


def test_each_wrong_service_is_said():
    wrong = {"pop3": True, "imap": {"port": 0, "prot": 1}, "smtp": False, "pop3s": False, "sieve": {"port": 4191}}
    assert problems({"services": wrong, "log": {"rate": 1, "group": -1}}) == [
        "mailfw:services:pop3: True: expected false or a mapping such as {port: 2587}",
        "mailfw:services:imap:prot: unknown key; did you mean port?",
        "mailfw:services:imap:port: 0: expected a whole number from 1 to 65535",
        "mailfw:services: 'smtp': expected one of submission, submissions, imap, imaps, pop3, pop3s, sieve",
        "mailfw:log:rate: 1: expected a rate such as 10/minute: a count from 1 to 100000 and a unit",
        "mailfw:log:group: -1: expected a whole number from 0 to 65535",
    ]


def test_long_values_are_cut():
    (problem,) = problems({"autoban": {"rate": "9" * 10_000}})
    assert len(problem) < 250


@pytest.mark.parametrize(
    "pillar",
    [
        {"fleet": {"keys": SECRET}},
        {"fleet": {"keys": {"new": SECRET}}},
        {"fleet": {"keys": [SECRET + "\n"]}},
        {"fleet": {"keys": [[SECRET]]}},
        {"fleet": {"key": [SECRET]}},
        {"fleet": {"Keys": SECRET}},
        {"fleet": [SECRET]},
        {"fleet": SECRET},
        {"keys": [SECRET]},
        {"fleets": {"keys": [SECRET]}},
        [{"fleet": {"keys": [SECRET]}}],
    ],
)
def test_secrets_are_not_shown(pillar):
    assert SECRET not in "\n".join(problems(pillar))


def test_key_of_32_characters_is_long_enough():
    key = "k" * 31 + "l"
    assert settings.resolve({"fleet": {"keys": [key]}})["fleet"]["keys"] == [key]
    assert problems({"fleet": {"keys": ["k" * 31, "é" * 32, 10**40]}})[2].startswith("mailfw:fleet:keys[2]")


@pytest.mark.parametrize("key", [" " * 32, "0" * 64, f" {SECRET}", f"{SECRET} "])
def test_key_that_is_no_secret_or_was_copied_with_blanks(key):
    (problem,) = problems({"fleet": {"keys": [SECRET, key]}})
    assert problem == (
        "mailfw:fleet:keys[1]: (not shown): expected a secret of at least 32 characters, such as "
        "'openssl rand -hex 32' prints; not one character again and again, nor white space around it"
    )


def test_conflicting_prefixes():
    (problem,) = problems({"autoban": {"ipv6_prefix": 48, "networks": {}}})
    assert problem == (
        "mailfw:autoban:networks:ipv6_prefix: 48: must be shorter than mailfw:autoban:ipv6_prefix, which is 48"
    )
    assert settings.resolve({"autoban": {"ipv6_prefix": 49, "networks": {}}})
    assert settings.resolve({"autoban": {"ipv6_prefix": 48}})


def test_a_host_where_nobody_logs_in_has_to_hear_of_logins():
    """Protected submission would open for nobody."""
    pillar = {"roles": ["postfix"], "protection": {"type": "protected"}}
    (problem,) = problems(pillar)
    assert problem.startswith("mailfw:fleet:keys: []: in mode protected submission, submissions opens for addresses")
    assert "expected a key, under which other hosts tell of logins" in problem
    assert settings.resolve({**pillar, "fleet": {"keys": ["0123456789abcdef" * 2]}})
    assert settings.resolve({**pillar, "protection": {"type": "private"}})
    assert settings.resolve({**pillar, "roles": ["dovecot", "postfix"]})


@pytest.mark.parametrize(
    ("services", "conflicts"),
    [
        ({"imap": {"port": 25}}, {"imap": (25, "smtp")}),
        ({"submission": {"port": 465}}, {"submission": (465, "submissions")}),
        ({"submissions": {"port": 587}}, {"submissions": (587, "submission")}),
        ({"submission": {"port": 143}}, {"submission": (143, "imap")}),
        ({"sieve": {"port": 587}, "pop3": {"port": 110}}, {"sieve": (587, "submission")}),
        ({"imap": {"port": 2000}, "pop3": {"port": 2000}}, {"pop3": (2000, "imap")}),
        ({"imap": {"port": 25}, "sieve": {"port": 993}}, {"imap": (25, "smtp"), "sieve": (993, "imaps")}),
    ],
)
def test_services_on_the_same_port(services, conflicts):
    """It is said of a service that the pillar has moved, not of the one whose port it is."""
    assert problems({"services": services}) == [
        f"mailfw:services:{name}:port: {port}: is the port of {other}; expected one of its own"
        for name, (port, other) in conflicts.items()
    ]


@pytest.mark.parametrize(
    "pillar",
    [
        {"services": {"submission": {"port": 465}, "submissions": {"port": 587}}},
        {"services": {"submission": False, "submissions": {"port": 587}}},
        {"services": {"imap": {"port": 587}}, "roles": ["dovecot"]},
        {"services": {"submission": {"port": 465}, "imap": {"port": 465}}, "roles": []},
        {"services": {"imap": {"port": 143}}},
    ],
)
def test_services_that_do_not_meet(pillar):
    settings.resolve(pillar)


def test_conflicts_are_said_at_once():
    lists = {"networks_ipv4": ["192.0.2.0/24"]}
    found = problems(
        {
            "autoban": {"ipv6_prefix": 48, "networks": {}},
            "services": {"imap": {"port": 993}},
            "trusted": lists,
            "blocked": lists,
        }
    )
    assert [problem.split(": ")[0] for problem in found] == [
        "mailfw:autoban:networks:ipv6_prefix",
        "mailfw:services:imap:port",
        "mailfw:blocked:networks_ipv4",
    ]


@pytest.mark.parametrize(("family", "network"), [("ipv4", "192.0.2.0/24"), ("ipv6", "2001:db8::/48")])
def test_network_both_trusted_and_blocked(family, network):
    lists = {f"networks_{family}": [network]}
    (problem,) = problems({"trusted": lists, "blocked": lists})
    assert problem == (
        f"mailfw:blocked:networks_{family}: '{network}': is also in mailfw:trusted:networks_{family}, which wins"
    )


def test_trusted_network_inside_a_blocked_one_is_fine():
    assert settings.resolve(
        {"trusted": {"networks_ipv4": ["192.0.2.7"]}, "blocked": {"networks_ipv4": ["192.0.2.0/24"]}}
    )


@pytest.mark.parametrize(
    ("roles", "names"),
    [
        ([], []),
        (["postfix"], ["smtp", "submission", "submissions"]),
        (["dovecot"], ["imap", "imaps", "pop3", "pop3s", "sieve"]),
        (["dovecot", "postfix"], list(settings.SERVICES)),
    ],
)
def test_services_are_those_of_the_roles(roles, names):
    found = settings.resolve({"roles": roles})
    assert [service["name"] for service in found["services"]] == names
    assert settings.login_ports(found) == [settings.SERVICES[name].port for name in names if name != "smtp"]


@pytest.mark.parametrize("mode", settings.MODES)
@pytest.mark.parametrize("other", settings.MODES)
def test_mode_of_single_services(mode, other):
    found = settings.resolve({"protection": {"type": mode, "services": {"sieve": other, "submission": other}}})
    modes = {service["name"]: service["mode"] for service in found["services"]}
    assert modes.pop("smtp") == "public"
    assert modes.pop("sieve") == modes.pop("submission") == other
    assert set(modes.values()) == {mode}


def test_override_for_a_role_that_the_host_has_not():
    found = settings.resolve({"roles": ["postfix"], "protection": {"services": {"sieve": "private"}}})
    assert {service["mode"] for service in found["services"] if service["login"]} == {"autoban"}


@pytest.mark.parametrize("name", settings.LOGIN_SERVICES)
def test_service_that_is_switched_off_is_nowhere(name):
    found = settings.resolve({"services": {name: False}, "protection": {"services": {name: "private"}}})
    port = settings.SERVICES[name].port
    assert [service["name"] for service in found["services"]] == [one for one in settings.SERVICES if one != name]
    assert port not in settings.login_ports(found)
    for asked in (name, port):
        with pytest.raises(ValueError, match=r"expected one of this host's: ") as raised:
            settings.ports(found, [asked])
        assert f" {name} (" not in str(raised.value)


@pytest.mark.parametrize("name", settings.LOGIN_SERVICES)
def test_service_on_another_port_is_there_everywhere(name):
    found = settings.resolve({"services": {name: {"port": 2587}}, "protection": {"services": {name: "private"}}})
    known = settings.SERVICES[name]
    (moved,) = (service for service in found["services"] if service["name"] == name)
    assert moved == {"name": name, "port": 2587, "role": known.role, "mode": "private", "login": True}
    ports = [2587 if one == name else settings.SERVICES[one].port for one in settings.LOGIN_SERVICES]
    assert settings.login_ports(found) == ports
    assert settings.ports(found, [name, 2587]) == [2587]
    with pytest.raises(ValueError, match=rf"expected one of this host's: .*{name} \(2587\)"):
        settings.ports(found, [known.port])


def test_ports():
    found = settings.resolve({})
    assert settings.ports(found, ["imap", "587", 4190]) == [143, 587, 4190]
    assert settings.ports(found, []) == []
    assert settings.ports(found, list(settings.LOGIN_SERVICES)) == settings.login_ports(found)


def test_ports_are_named_once():
    """The kernel refuses a script that deletes an element twice."""
    assert settings.ports(settings.resolve({}), ["imap", 143, "imap", "143"]) == [143]


@pytest.mark.parametrize("name", ["smtp", 25, "", "IMAP", 0, True, None, "143 ", "x" * 1000, [143]])
def test_ports_that_no_login_opens(name):
    with pytest.raises(ValueError, match=r"^service '.*': expected one of this host's: submission \(587\), "):
        settings.ports(settings.resolve({}), [name])


def test_ports_of_the_role_that_the_host_has_not():
    with pytest.raises(ValueError, match=r"expected one of this host's: submission \(587\), submissions \(465\)$"):
        settings.ports(settings.resolve({"roles": ["postfix"]}), ["imap"])


#: Pillars that are nearly right: some of the keys, with values of their form or with anything.
_FORMS = {
    "mailfw:protection:type": st.sampled_from(settings.MODES),
    "mailfw:protection:services": st.dictionaries(
        st.sampled_from(list(settings.SERVICES)), st.sampled_from(settings.MODES), max_size=3
    ),
    "mailfw:roles": st.lists(st.sampled_from(settings.ROLES), max_size=3),
    "mailfw:services": st.dictionaries(
        st.sampled_from(list(settings.SERVICES)),
        st.just(False) | st.fixed_dictionaries({}, optional={"port": st.none() | st.integers(-1, 65537)}),
        max_size=4,
    ),
    "mailfw:log": st.just(False)
    | st.fixed_dictionaries({}, optional={"rate": st.just("1/hour"), "group": st.none() | st.integers(0, 65535)}),
    "mailfw:mark": rendering.MARKS,
    **{f"mailfw:sizes:{key}": st.integers(1, 2**24) for key in settings.SCHEMA["sizes"]},
    "mailfw:autoban:networks": st.fixed_dictionaries({}, optional={"ipv6_prefix": st.integers(10, 70)}),
}


def _nearly_right(schema, path="mailfw"):
    optional = {}
    for key, entry in schema.items():
        here = f"{path}:{key}"
        if isinstance(entry, dict):
            optional[key] = _nearly_right(entry, here)
        elif "networks_ipv" in key:
            optional[key] = st.lists(arbitrary.networks(int(key[-1])), max_size=3)
        else:
            optional[key] = _FORMS.get(here, st.just(entry.default)) | st.just(entry.default)
    return st.fixed_dictionaries({}, optional=optional)


def _spoilt(pillar):
    """Put anything in place of one value, by path."""
    return st.tuples(st.just(pillar), st.sampled_from(list(settings.SCHEMA)), arbitrary.values).map(
        lambda parts: {**parts[0], parts[1]: parts[2]}
    )


@given(arbitrary.values | _nearly_right(settings.SCHEMA) | _nearly_right(settings.SCHEMA).flatmap(_spoilt))
def test_resolve_gives_settings_or_says_why_not(pillar):
    found, said = attempt(pillar)
    if found is None:
        assert said
        assert all(problem.startswith("mailfw") for problem in said)
    else:
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert rules.context(found)
        assert rules.files(found)
        ports = [service["port"] for service in found["services"]]
        assert len(set(ports)) == len(ports)


@given(st.sampled_from(list(options())), arbitrary.values)
def test_each_key_takes_any_value_or_says_why_not(option, value):
    path, _ = option
    pillar = value
    for key in reversed(path.split(":")[1:]):
        pillar = {key: pillar}
    _, said = attempt(pillar)
    assert all(problem.startswith(path) for problem in said)


@given(_nearly_right(settings.SCHEMA))
def test_pillars_of_the_right_form_are_refused_for_conflicts_only(pillar):
    _, said = attempt(pillar)
    conflicts = (
        "which wins",
        "must be shorter",
        "in a list for IPv6",
        "a whole number from 16",
        "a whole number from 1 to 65535",
        "services: 'smtp'",
        "expected one of its own",
        "nobody logs in on this host",
    )
    for problem in said:
        assert any(words in problem for words in conflicts)


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_users_may_be_off_as_yaml_reads_it(text):
    assert settings.resolve(yaml.safe_load(f"trusted: {{users: {text}}}"))["trusted"]["users"] == "off"
