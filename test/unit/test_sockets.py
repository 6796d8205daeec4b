"""What ss prints (iproute2 6.1), and what becomes of it."""

import subprocess

import pytest

from mailfwlib import parse, sockets

CONNECTIONS = """\
ESTAB      0      0          192.0.2.25:143     198.51.100.10:40000
CLOSE-WAIT 1      0          192.0.2.25:2587    198.51.100.10:40001
ESTAB      0      0  [2001:db8:25::25]:993  [2001:db8:a::10]:40002
ESTAB      0      0  [::ffff:192.0.2.25]:143 [::ffff:198.51.100.11]:40003
ESTAB      0      0  [fe80::80be:1ff:fea3:b214]%eth0:143 [fe80::804e:5cff:fea4:bdca]:48626
"""
LISTENING = """\
LISTEN 0      100          0.0.0.0:25        0.0.0.0:*
LISTEN 0      100                *:143             *:*
LISTEN 0      100             [::]:587          [::]:*
LISTEN 0      128       192.0.2.25:993       0.0.0.0:*
LISTEN 0      128  [2001:db8::25]:995          [::]:*
LISTEN 0      100        127.0.0.1:110       0.0.0.0:*
LISTEN 0      100       127.0.0.53%lo:53     0.0.0.0:*
LISTEN 0      100            [::1]:465          [::]:*
LISTEN 0      100 [::ffff:127.0.0.1]:4190        *:*
LISTEN 0      100 [fe80::80be:1ff:fea3:b214]%eth0:8025 [::]:*
"""


@pytest.fixture
def ss(monkeypatch):
    """Return a function that sets what ss does; ``calls`` has its arguments."""

    class Ss:
        def __init__(self):
            self.calls, self.done = [], subprocess.CompletedProcess([], 0, "", "")

        def prints(self, stdout="", stderr="", code=0):
            self.done = subprocess.CompletedProcess([], code, stdout, stderr)

        def run(self, command, timeout=None, **options):
            assert command[0] == "ss"
            assert timeout == sockets.TIMEOUT
            self.calls.append(" ".join(command[1:]))
            if isinstance(self.done, BaseException):
                raise self.done
            return self.done

    made = Ss()
    monkeypatch.setattr(subprocess, "run", made.run)
    return made


def test_connections(ss):
    ss.prints(CONNECTIONS)
    assert sockets.connections([143, 2587]) == [
        (parse.address("198.51.100.10"), 40000, 143),
        (parse.address("198.51.100.10"), 40001, 2587),
        (parse.address("2001:db8:a::10"), 40002, 993),
        (parse.address("198.51.100.11"), 40003, 143),
        (parse.address("fe80::804e:5cff:fea4:bdca"), 48626, 143),
    ]
    assert ss.calls == ["-Htn state established state close-wait ( sport = :143 or sport = :2587 )"]


def test_connections_without_a_state_column(ss):
    """With one state in its filter, ss leaves the column out."""
    ss.prints("0 0 192.0.2.25:143 198.51.100.10:40000\n")
    assert sockets.connections([143]) == [(parse.address("198.51.100.10"), 40000, 143)]


def test_no_connections(ss):
    assert sockets.connections([143]) == []


def test_ports_may_be_any_iterable(ss):
    sockets.connections(map(int, ["143"]))
    assert ss.calls[0].endswith("( sport = :143 )")


def test_listening_for_more_than_the_host_itself(ss):
    ss.prints(LISTENING)
    assert sockets.listening() == {25, 143, 587, 993, 995, 8025}
    assert ss.calls == ["-Htnl"]


@pytest.mark.parametrize(
    ("network", "spared", "words"),
    [
        ("192.0.2.7/32", (), "dst 192.0.2.7/32 and ( sport = :143 or sport = :587 )"),
        (
            "192.0.2.0/24",
            ["192.0.2.8/32", "192.0.2.128/25"],
            "dst 192.0.2.0/24 and not dst 192.0.2.8/32 and not dst 192.0.2.128/25 and ( sport = :143 or sport = :587 )",
        ),
        ("2001:db8:a::/64", (), "dst 2001:db8:a::/64 and ( sport = :143 or sport = :587 )"),
    ],
)
def test_end(ss, network, spared, words):
    ss.prints(CONNECTIONS)
    assert sockets.end(parse.network(network), [143, 587], spared) == 5
    (call,) = ss.calls
    assert call.startswith("-HtnK state connected ")
    assert call.endswith(f" {words}")


def test_end_of_none(ss):
    assert sockets.end(parse.network("192.0.2.7"), [143]) == 0


@pytest.mark.parametrize("call", [lambda: sockets.connections([143]), sockets.listening])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "ss"), "ss: [Errno 2] No such file or directory: 'ss'"),
        (PermissionError(13, "Permission denied", "ss"), "ss: [Errno 13] Permission denied: 'ss'"),
        (
            subprocess.TimeoutExpired(["ss"], sockets.TIMEOUT),
            f"ss: Command '['ss']' timed out after {sockets.TIMEOUT} seconds",
        ),
        (("", "ss: bison bellows\n", 0), "ss: bison bellows"),
        (
            ("", "Cannot open netlink socket: Operation not permitted\n", 255),
            "Cannot open netlink socket: Operation not",
        ),
        (("half a line", "", 1), "ss: exit status 1"),
    ],
)
def test_failures_are_errors(ss, call, failure, message):
    if isinstance(failure, BaseException):
        ss.done = failure
    else:
        ss.prints(*failure)
    with pytest.raises(sockets.SocketsError) as raised:
        call()
    assert str(raised.value).startswith(message)
