"""What long work says on stderr."""

import io
import re
import sys
import time

import pytest

from fisherscope import telling
from fisherscope.telling import Pace, steps


@pytest.fixture
def impatient(monkeypatch):
    """Reminders come at once."""
    monkeypatch.setattr(telling, "_SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(telling, "_SECONDS_BEFORE_A_GUESS", 0.0)


def test_one_line_for_each_step_with_its_own_seconds(capsys):
    """Steps inside others are told apart: the seconds of the inner one are not those of the outer one."""
    with steps("analyze", 1, quiet=False) as told, told.step("overlap"):
        time.sleep(0.11)
        with told.step("masks"):
            time.sleep(0.31)
    lines = re.findall(r"analyze (\w+): (\d\.\d) s\n", capsys.readouterr().err)
    assert [name for name, _ in lines] == ["masks", "overlap"]
    assert float(lines[0][1]) >= 0.3
    assert 0.1 <= float(lines[1][1]) < 0.3


def test_quiet_says_nothing(capsys, impatient):
    """Neither steps, nor details, nor how long."""
    with steps("analyze", 1, quiet=True) as told, told.step("masks"):
        told.detail("pair 1 of 2")
        time.sleep(0.1)
    pace = Pace("positions", 100, quiet=True)
    for _ in range(10):
        time.sleep(0.01)
        pace.advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_long_step_says_where_it_is(capsys, impatient):
    """Where nothing was said for long, the present detail is; announced steps are said when they begin."""
    with steps("analyze", 1, quiet=False) as told, told.step("conflict"):
        told.detail("pair 2 of 6")
        time.sleep(0.3)
    assert "analyze conflict: pair 2 of 6 ...\n" in capsys.readouterr().err
    with steps("estimate:", 1, quiet=False, announce=True) as told, told.step("hashing the weights"):
        assert capsys.readouterr().err == "estimate: hashing the weights\n"


def test_a_failed_step_is_told_and_the_error_goes_on(capsys):
    """What a step raises is raised, and its time is told."""
    with pytest.raises(ZeroDivisionError), steps("analyze", 1, quiet=False) as told, told.step("masks"):
        raise ZeroDivisionError
    assert re.fullmatch(r"analyze masks: \d\.\d s\n", capsys.readouterr().err)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch):
    """On a terminal the line is drawn over itself: the name of a step, how many are done, and the time."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with steps("analyze", 2, quiet=False) as told:
        with told.step("masks"):
            time.sleep(0.2)
        with told.step("[overlap]"):
            time.sleep(0.2)
    shown = terminal.getvalue()
    assert "\x1b[2K" in shown
    assert "analyze masks" in shown
    assert "analyze [overlap]" in shown
    assert "2/2" in shown
    assert shown.count("\n") <= 2


def test_pace_speaks_where_work_is_long_and_not_before(capsys, monkeypatch):
    """How much is done and how long the rest will take; work that ends soon says nothing."""
    now = [0.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    short = Pace("positions", 10, quiet=False)
    for _ in range(10):
        now[0] += 1
        short.advance(1)
    assert capsys.readouterr().err == ""
    long = Pace("positions", 100, quiet=False)
    for _ in range(14):
        now[0] += 1
        long.advance(1)
    assert capsys.readouterr().err == (
        "positions: 2% done, about 98 s left\npositions: 12% done, about 88 s left\n"
    )


@pytest.mark.parametrize("broken", [None, "closed"])
def test_no_stderr_stops_no_work(monkeypatch, broken):
    """None under pythonw, or closed: the work goes on."""
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if broken else None)
    with steps("analyze", 1, quiet=False) as told, told.step("masks"):
        told.detail("pair")
