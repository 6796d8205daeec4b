"""map.jinja and init.sls as Salt renders them: before mailfw's own modules are on a minion."""

import json

import jinja2
import pytest
import salt.config
import salt.modules.grains
import salt.utils.templates
import yaml

from mailfwlib import settings

BROKEN = [
    *(None, "autoban", "", [], ["autoban"], 5, 1.5, True, False),
    *({"roles": value} for value in ("postfix", "", 5, 0, 1.5, True, False, None)),
]
DEFAULT = list(settings.ROLES)


@pytest.fixture(scope="module")
def opts(root, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("salt"))
    return {
        **salt.config.minion_config(None),
        "id": "unit",
        "root_dir": directory,
        "cachedir": directory,
        "file_client": "local",
        "file_roots": {"base": [str(root)]},
        "pillar_roots": {"base": []},
        "test": False,
    }


@pytest.fixture
def render(opts, monkeypatch):
    """Return a function that renders a template as Salt does for a state."""

    def render_for(text, pillar, os_family="Debian", test=False, modules=()):
        grains = {"os_family": os_family}
        monkeypatch.setattr(salt.modules.grains, "__grains__", grains, raising=False)
        context = {
            "opts": {**opts, "test": test},
            "saltenv": "base",
            "sls": "mailfw",
            "tmplpath": None,
            "grains": grains,
            "pillar": pillar,
            "salt": {"grains.filter_by": salt.modules.grains.filter_by, **dict.fromkeys(modules)},
        }
        return salt.utils.templates.render_jinja_tmpl(text, context)

    return render_for


@pytest.fixture
def imported(render):
    """Return a function that returns what states import from map.jinja."""
    template = '{%- from "mailfw/map.jinja" import roles, os with context %}{{ {"roles": roles, "os": os} | json }}'
    return lambda pillar, **more: json.loads(render(template, pillar, **more))


@pytest.mark.parametrize("pillar", [{}, {"mailfw": {}}, {"mailfw": {"enforce": False}}])
def test_default_roles_are_the_schemas(imported, pillar):
    assert imported(pillar)["roles"] == settings.resolve(pillar.get("mailfw"))["roles"] == DEFAULT


@pytest.mark.parametrize("roles", [[], ["postfix"], ["dovecot"], ["postfix", "dovecot"], ["dovecot", "postfix"]])
def test_roles_are_the_pillars(imported, roles):
    assert set(imported({"mailfw": {"roles": roles}})["roles"]) == set(settings.resolve({"roles": roles})["roles"])


@pytest.mark.parametrize("pillar", BROKEN, ids=repr)
def test_broken_pillar_gives_the_default_roles(imported, pillar):
    """The state settings_valid says what is wrong with it; it is not for a template to fail first."""
    assert imported({"mailfw": pillar})["roles"] == DEFAULT


@pytest.mark.parametrize("roles", [["exim"], [5], [None], [["postfix"]], {"postfix": 1}, {}])
def test_roles_of_no_use_render(imported, roles):
    imported({"mailfw": {"roles": roles}})


@pytest.fixture
def directory(render):
    """Return a function that returns where states expect metrics."""
    template = '{%- from "mailfw/map.jinja" import metrics_directory with context %}{{ metrics_directory | json }}'
    return lambda pillar: json.loads(render(template, {"mailfw": pillar}))


@pytest.mark.parametrize(
    "pillar", [*BROKEN, {"metrics": {}}, {"metrics": False}, {"metrics": {"directory": [5]}}], ids=repr
)
def test_metrics_are_expected_where_the_schema_says(directory, pillar):
    assert directory(pillar) == settings.resolve({})["metrics"]["directory"]


def test_metrics_are_expected_where_the_pillar_says(directory):
    assert directory({"metrics": {"directory": "/srv/text", "interval": "1m"}}) == "/srv/text"


@pytest.mark.parametrize(
    ("metrics", "allowed", "removed"),
    [
        ({}, ["-/var/lib/prometheus/node-exporter"], None),
        ({"directory": "/srv/text"}, ["-/srv/text"], None),
        (False, [], "/var/lib/prometheus/node-exporter/mailfw.prom"),
    ],
    ids=repr,
)
def test_agent_may_write_metrics_where_the_pillar_says(render, root, metrics, allowed, removed):
    """And nowhere without them; the directory need not be there when the agent starts."""
    agent = root / "mailfw/agent"
    states = yaml.safe_load(render((agent / "init.sls").read_text(), {"mailfw": {"metrics": metrics}}))
    names = states["mailfw agent can be started"]["file.managed"][0]["names"]
    ((_, options),) = (
        pair for one in names if isinstance(one, dict) for pair in one.items() if "agent.service" in pair[0]
    )
    (context,) = (one["context"] for one in options if "context" in one)
    unit = jinja2.Template((agent / "files/mailfw-agent.service").read_text()).render(context)
    written = [path for line in unit.splitlines() if line.startswith("ReadWritePaths=") for path in line[15:].split()]
    assert written == ["/run/mailfw", "/var/lib/mailfw", *allowed]
    gone = states.get("mailfw agent writes no metrics", {"file.absent": [{"name": None}]})
    assert gone["file.absent"][0]["name"] == removed


@pytest.mark.parametrize(
    ("os_family", "libexec"),
    [("Debian", "/usr/lib/dovecot"), ("RedHat", "/usr/libexec/dovecot"), ("Plan9", "/usr/lib/dovecot")],
)
def test_paths_are_those_of_the_distribution(imported, os_family, libexec, root):
    found = imported({}, os_family=os_family)["os"]
    assert found["dovecot_libexec"] == libexec
    default = yaml.safe_load((root / "mailfw/osfamily.yaml").read_text())["default"]
    assert found.keys() == default.keys()
    assert found["packages"] == default["packages"]


@pytest.fixture
def included(render, root):
    """Return a function that returns what init.sls includes."""
    text = (root / "mailfw/init.sls").read_text()
    return lambda pillar, **more: yaml.safe_load(render(text, pillar, **more)).get("include")


@pytest.mark.parametrize(
    ("roles", "states"),
    [
        (None, ["ruleset", "postfix", "dovecot", "agent"]),
        (["dovecot", "postfix"], ["ruleset", "postfix", "dovecot", "agent"]),
        (["postfix"], ["ruleset", "postfix", "agent"]),
        (["dovecot"], ["ruleset", "dovecot", "agent"]),
        ([], ["ruleset"]),
    ],
)
def test_states_are_those_of_the_roles(included, roles, states):
    assert included({"mailfw": {} if roles is None else {"roles": roles}}) == [f"mailfw.{state}" for state in states]


@pytest.mark.parametrize("pillar", BROKEN, ids=repr)
def test_broken_pillar_includes_what_says_so(included, pillar):
    assert "mailfw.ruleset" in included({"mailfw": pillar})


def test_dry_run_on_a_new_minion_includes_nothing(included):
    """The module is not there yet, and test=True must not bring it."""
    assert included({}, test=True) is None
    assert "mailfw.ruleset" in included({}, test=True, modules=["mailfw.apply"])
