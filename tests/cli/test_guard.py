"""Exceptions become exit codes and one message; other errors stay visible as the bugs they are."""

import logging
import signal
import warnings

import pytest
import torch
import typer

from fisherscope.cli.guard import guarded
from fisherscope.errors import DataError, Interrupted


def ended(error, **options):
    @guarded
    def command(debug=False):
        raise error

    with pytest.raises(typer.Exit) as caught:
        command(**options)
    return caught.value.exit_code


def test_expected_errors(capsys):
    """1, one line, no traceback; with debug the traceback too."""
    assert ended(DataError("bad line 3")) == 1
    assert capsys.readouterr().err == "error: bad line 3\n"
    assert ended(DataError("bad line 3"), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(capsys, number, code):
    """128 and the signal's number, with the message that names the command which resumes."""
    assert ended(Interrupted("resume with: x", number)) == code
    assert capsys.readouterr().err == "interrupted: resume with: x\n"


def test_files_and_full_gpus(capsys):
    """Errors of the system speak for themselves; the one of a full GPU gets its next step."""
    assert ended(PermissionError(13, "Permission denied", "run.fs")) == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'run.fs'\n"
    assert ended(torch.OutOfMemoryError("CUDA out of memory.")) == 1
    assert capsys.readouterr().err == "error: CUDA out of memory; use a smaller --batch-size\n"


def test_keyboard_interrupt(capsys):
    """Outside a collection, too."""
    assert ended(KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    """What nobody expected is not dressed up."""
    for bug in (ZeroDivisionError, RuntimeError, BrokenPipeError):

        @guarded
        def command(bug=bug):
            raise bug

        with pytest.raises(bug):
            command()


def test_warnings_and_logs_are_sentences(capsys):
    """Without file names and line numbers; afterwards everything is as before."""
    before = warnings.showwarning

    @guarded
    def command():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("mind the gap", stacklevel=1)
        logging.getLogger("fisherscope.x").warning("and %s", "this")

    command()
    assert capsys.readouterr().err == "warning: mind the gap\nwarning: and this\n"
    assert warnings.showwarning is before
    assert not logging.getLogger("fisherscope").handlers
