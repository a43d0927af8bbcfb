"""A collection in a thread, under an event loop, after a fork, in a spawned process, without asserts."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import fisherscope as fs
from tests import models
from tests.instrument import torch_states as states

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.instrument.test_process_state import digests
sys.stdout.write(digests(Path(sys.argv[1])))
"""


def digests(folder):
    """A whole run and its report: a digest of every number, for other flags of the interpreter."""
    scope = fs.wrap(models.build(models.named("qwen2"), layers=1), parameters="all")
    store = scope.collect(states.tasks(), folder / "run.fs", quiet=True)
    report = fs.analyze(store, ["fisher", "conflict"])
    assert not report.failed
    report.save(folder / "report")
    page = (folder / "report" / "report.html").read_bytes().decode("utf-8")
    found = {table.name: table.read_bytes() for table in sorted(folder.glob("report/tables/*.csv"))}
    found |= {name: repr(value).encode() for name, value in sorted(states.everything(store).items())}
    digested = (f"{name} {hashlib.sha256(value).hexdigest()}" for name, value in found.items())
    return "\n".join([f"page in ASCII: {page.isascii()}", *digested])


def collect(out, scope=None):
    scope = scope or fs.wrap(models.build(models.named("qwen2"), layers=1), parameters="all")
    return states.everything(scope.collect(states.tasks(), out, quiet=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("plain") / "run.fs")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return digests(tmp_path_factory.mktemp("printed"))


def started(tmp_path, *flags, **environment):
    """What the script prints under flags and variables."""
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, *flags, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def in_threads(*functions):
    """Run each in a thread of its own; their results."""
    results = [None] * len(functions)

    def call(place, function):
        results[place] = function()

    threads = [threading.Thread(target=call, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_in_a_thread(plain, tmp_path):
    """Outside the main thread, where no signal can be caught, a collection runs as it does inside."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert in_threads(lambda: collect(tmp_path / "run.fs")) == [plain]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_two_scopes_in_two_threads(plain, tmp_path):
    """Each has a model of its own; the default dtype that both set aside comes back in the end."""
    scopes = [fs.wrap(models.build(models.named("qwen2"), layers=1), parameters="all") for _ in range(2)]
    with states.STATES["bfloat16"]():
        found = in_threads(
            lambda: scopes[0].collect(states.tasks(), tmp_path / "0.fs", quiet=True),
            lambda: scopes[1].collect(states.tasks(), tmp_path / "1.fs", quiet=True),
        )
        assert torch.get_default_dtype() == torch.bfloat16
    assert [states.everything(store) for store in found] == [plain, plain]


def test_inside_of_an_event_loop(plain, tmp_path):
    """As in a notebook: called from a coroutine, and handed to a thread by one."""

    async def here():
        return collect(tmp_path / "here.fs")

    async def there():
        return await asyncio.to_thread(collect, tmp_path / "there.fs")

    assert asyncio.run(here()) == plain
    assert asyncio.run(there()) == plain


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_after_wrap(plain, tmp_path):
    """A child inherits a scope and collects with it; the parent's still works."""
    scope = fs.wrap(models.build(models.named("qwen2"), layers=1), parameters="all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12, where there are other threads
        child = os.fork()
    if not child:
        try:
            collect(tmp_path / "child.fs", scope)
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 100
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    assert states.everything(fs.open_store(tmp_path / "child.fs")) == plain
    assert collect(tmp_path / "parent.fs", scope) == plain


def test_warnings_as_errors_in_an_ascii_locale(printed, tmp_path):
    """Nothing warns, files are UTF-8, numbers are written alike, and no order is that of a set."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    assert started(tmp_path, "-b", "-W", "error", PYTHONHASHSEED="7", **ascii_only) == printed


@pytest.mark.slow
def test_without_asserts(printed, tmp_path):
    """No number depends on an assert statement; everything is compiled anew for that, which takes long."""
    assert started(tmp_path, "-O") == printed


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_options_of_pandas(tmp_path):
    """Tables hold the same, and analyses find the same."""
    store = fs.wrap(models.build(models.named("qwen2"), layers=1)).collect(
        states.tasks(), tmp_path / "run.fs", quiet=True
    )
    expected = states.everything(store), states.analysed(store)
    options = {
        "mode.copy_on_write": True,
        "mode.string_storage": "python",
        "future.infer_string": True,
        "display.precision": 1,
        "display.float_format": "{:.1f}".format,
    }
    with pd.option_context(*(part for option in options.items() for part in option)):
        assert (states.everything(store), states.analysed(store)) == expected
