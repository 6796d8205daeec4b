import pytest

from mailfwlib import breakglass


@pytest.mark.parametrize(
    ("period", "seconds"), [("2h", "7200s"), ("1h30m", "5400s"), (90, "90s"), ("7d", "604800s"), ("1w", "604800s")]
)
def test_periods(period, seconds):
    assert breakglass.arguments(period, "x") == (seconds, "x")


@pytest.mark.parametrize(
    "period", ["", "2x", "0s", 0, -1, "8d", "604801", "1h 2h", "2h;reboot", None, True, ["2h"], "9" * 5000]
)
def test_periods_that_are_refused(period):
    with pytest.raises(ValueError, match=r"^period .{1,80}: expected a duration such as 2h, 90m or 1d12h, at most 7d$"):
        breakglass.arguments(period, "x")


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("nobody can log in", "nobody can log in"),
        ("two\nlines,\r\n\ta tab", "two lines, a tab"),
        ("a\u00a0blank\u2028and a separator", "a blank and a separator"),
        (17, "17"),
        (True, "True"),
        ("", ""),
        ("-rf $(reboot) `id` %s 'quoted\" \\n; {a: [b]} # *", "-rf $(reboot) `id` %s 'quoted\" \\n; {a: [b]} # *"),
        ("é" * 100, "é" * 100),
        ("x" * 200, "x" * 200),
    ],
)
def test_reasons(reason, text):
    assert breakglass.arguments("2h", reason) == ("7200s", text)


@pytest.mark.parametrize(
    "reason",
    ["x" * 201, "x" * 5000, "é" * 101, "\x1b[2J", "\x00", "\u202e", "\udcff", {"a": 1}, ["a"], None],
    ids=lambda reason: ascii(reason)[:20],
)
def test_reasons_that_are_refused(reason):
    with pytest.raises(ValueError, match=r"^reason .{1,80}: expected text of at most 200 bytes$"):
        breakglass.arguments("2h", reason)
