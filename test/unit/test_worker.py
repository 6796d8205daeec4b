"""The agent's threads: what becomes of work that fails, and of a worker that is told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mailfwlib import worker
from mailfwlib.worker import Attempts, Worker, WorkError

#: Seconds in which a worker gets round to something.
SOON = 5.0


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is logged, and goes nowhere else: Salt's plugins log as well."""
    made = Log()
    monkeypatch.setattr(worker, "log", logging.Logger("mailfw-agent"))
    worker.log.addHandler(made)
    return made


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FIRST", 0.01)


def failing(error: Exception | None) -> Callable[[], None]:
    def step() -> None:
        if error:
            raise error

    return step


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([None, None], []),
        ([OSError("full")] * 3, ["no metrics: full"]),
        ([OSError("full"), None, None], ["no metrics: full", "no metrics: that is over"]),
        ([OSError("full"), OSError("gone"), OSError("gone")], ["no metrics: full", "no metrics: gone"]),
        (
            [OSError("full"), None, OSError("full")],
            ["no metrics: full", "no metrics: that is over", "no metrics: full"],
        ),
        ([AssertionError()] * 2, ["no metrics: AssertionError()"]),
    ],
)
def test_an_error_is_said_once_and_so_is_its_end(errors: list[Exception | None], said: list[str], log: Log) -> None:
    attempts = Attempts("no metrics")
    for error in errors:
        attempts.make(failing(error))
    assert log.messages == said


@pytest.mark.parametrize(("error", "explained"), [(OSError("full"), 1), (WorkError("off"), 1), (KeyError("host"), 0)])
def test_what_nobody_foresaw_is_logged_with_where_it_happened(error: Exception, explained: bool, log: Log) -> None:
    Attempts("no metrics").make(failing(error))
    (record,) = log.records
    assert (not record.exc_info) == explained


class Work:
    """Work that fails for as long as it is told to, and counts what was done."""

    def __init__(self) -> None:
        self.done = 0
        self.ends: list[str] = []
        self.error: Exception | None = None
        self.pause: float | None = 0.01
        self.worker = Worker("work", "no work", self._do, self._wait, lambda: self.ends.append("end"))

    def _do(self) -> None:
        self.done += 1
        if self.error:
            raise self.error

    def _wait(self) -> float:
        if self.pause is None:
            raise KeyError("interval")
        return self.pause

    def goes_on(self) -> bool:
        """Return whether more is done before long."""
        before = self.done
        return soon(lambda: self.done > before + 3)


def soon(condition: Callable[[], bool]) -> bool:
    late = time.monotonic() + SOON
    while not condition() and time.monotonic() < late:
        time.sleep(0.01)
    return condition()


def threads() -> set[str]:
    return {one.name for one in threading.enumerate()}


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    made.worker.start()
    assert "work" in threads()
    yield made
    made.worker.stop()
    assert made.ends == ["end"]
    assert "work" not in threads()


def test_what_goes_wrong_ends_no_worker(work: Work, log: Log) -> None:
    assert work.goes_on()
    for work.error in (OSError("full"), KeyError("host"), None):
        assert work.goes_on()
    assert log.messages == ["no work: full", "no work: 'host'", "no work: that is over"]


def test_a_pause_that_cannot_be_told_is_the_one_before(work: Work, log: Log) -> None:
    assert work.goes_on()
    work.pause = None
    assert work.goes_on()
    assert log.messages == ["no work: 'interval'"]


def test_stopping_waits_for_no_pause() -> None:
    work = Work()
    work.pause = 3600.0
    work.worker.start()
    assert soon(lambda: work.done == 1)
    began = time.monotonic()
    work.worker.stop()
    assert time.monotonic() - began < 1
    assert (work.done, work.ends) == (1, ["end"])


def test_stopping_waits_for_work_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    begun, released, ends = threading.Event(), threading.Event(), []

    def hang() -> None:
        begun.set()
        released.wait(SOON)

    made = Worker("work", "no work", hang, lambda: 0.01, lambda: ends.append("end"))
    made.start()
    assert begun.wait(SOON)
    began = time.monotonic()
    made.stop()
    assert time.monotonic() - began < 1
    assert not ends
    released.set()
    assert soon(lambda: ends == ["end"])


def test_the_last_step_may_fail(log: Log) -> None:
    made = Worker("work", "no work", failing(None), lambda: 0.01, failing(OSError("full")))
    made.start()
    made.stop()
    assert log.messages == ["no work: full"]


@pytest.mark.parametrize(
    ("step", "least", "most"), [(lambda: time.sleep(0.3), 0, 0.1), (lambda: sum(range(5_000_000)), 0.02, 5)]
)
def test_what_an_attempt_takes_is_processor_time(step: Callable[[], object], least: float, most: float) -> None:
    done = threading.Event()
    made = Worker("work", "no work", step, lambda: done.set() or 3600.0)
    made.start()
    assert done.wait(SOON)
    made.stop()
    assert least <= made.took <= most
