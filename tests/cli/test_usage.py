"""Wrong usage ends with 2 and says what is wrong; help teaches; the command line starts quickly."""

import os
import subprocess
import sys

import pytest

from fisherscope.cli import app

COMMANDS = [command.callback.__name__ for command in app.registered_commands]


def test_commands():
    """The commands that there are."""
    assert COMMANDS == [
        "demo",
        "estimate",
        "collect",
        "analyze",
        "calibrate",
        "inspect",
        "verify",
        "finalize",
    ]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help(run, arguments):
    """Names every command, and where to begin."""
    shown = run(*arguments)
    assert all(name in shown.output for name in [*COMMANDS, "fisherscope demo"])
    assert shown.exit_code == (0 if arguments else 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(run, command):
    """Every command shows a line that can be typed."""
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"Example: fisherscope {command}" in shown.output
    assert "--debug" in shown.output


def test_version(run):
    """One line."""
    from fisherscope import __version__

    assert run("--version").stdout == f"fisherscope {__version__}\n"


def test_nothing_heavy_is_imported_for_help():
    """torch, transformers, pandas and h5py wait until a command needs them."""
    heavy = "{'torch', 'transformers', 'pandas', 'h5py', 'plotly', 'numpy'}"
    code = f"import sys, fisherscope.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["collect"], "Missing option"),
        (["estimate"], "Missing option"),
        (["analyze"], "Missing argument 'STORE'"),
        (["inspect"], "Missing argument 'STORE'"),
        (["verify"], "Missing argument 'STORE'"),
        (["finalize"], "Missing argument 'STORE'"),
        (["demo", "--bogus"], "No such option"),
    ],
)
def test_wrong_usage(run, arguments, message):
    """Exit code 2."""
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert message in shown.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "math"], "'math' is not NAME=FILE.jsonl"),
        (["--task", "=x.jsonl"], "is not NAME=FILE.jsonl"),
        (["--task", "math="], "is not NAME=FILE.jsonl"),
        (["--task", "a=x.jsonl", "--task", "a=y.jsonl"], "two tasks are called 'a' (x.jsonl and y.jsonl)"),
        (["--task", "a=x", "--batch-size", "0"], "neither 'auto' nor a positive number"),
        (["--task", "a=x", "--max-length", "1"], "Invalid value for '--max-length'"),
        (["--task", "a=x", "--max-samples", "0"], "Invalid value for '--max-samples'"),
        (["--task", "a=x", "--rank", "2", "--world-size", "2"], "no rank 2 among 2"),
        (["--task", "a=x", "--world-size", "2", "--no-resume"], "several ranks join one store"),
        (["--task", "a=x", "--encoding", "sparse"], "--encoding"),
        (["--task", "a=x", "--gradient-rank", "0"], "--gradient-rank"),
        (["--task", "a=x", "--gradient-samples", "0"], "--gradient-samples"),
        (["--task", "a=x", "--fisher", "half"], "--fisher"),
        (["--task", "a=x", "--labels", "mine"], "--labels"),
        (["--task", "a=x", "--draws", "0"], "--draws"),
        (["--task", "a=x", "--also", "everything"], "--also"),
        (["--task", "a=x", "--parameters", "all", "--parameters", "*.weight"], "'all' cannot be combined"),
    ],
)
def test_wrong_options_of_collect(run, tmp_path, extra, message):
    """Found before a model is loaded or anything is written."""
    shown = run("collect", "--model", "nowhere", "--out", tmp_path / "run.fs", *extra)
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.replace("│", " ").split())
    assert not (tmp_path / "run.fs").exists()


def test_equals_signs_in_file_names(run, tmp_path):
    """Only the first one separates the name."""
    from fisherscope.cli.tasks import parse_tasks

    assert str(parse_tasks(["a=b=c.jsonl"])["a"]) == "b=c.jsonl"


def test_help_on_an_ascii_terminal():
    """Characters that stdout cannot show are replaced; the command goes on."""
    run = subprocess.run(
        [sys.executable, "-m", "fisherscope", "collect", "--help"],
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Example: fisherscope collect" in run.stdout
