"""``fisherscope analyze``: reports, choices, failures."""

import json
import re

import pytest

from fisherscope.analyses import REGISTRY, Registry


@pytest.fixture(scope="module")
def collect(model_dir, tmp_path_factory, write_task):
    """Collects two small tasks with further options and returns the store."""
    from typer.testing import CliRunner

    from fisherscope.cli import app

    def collect(*options):
        path = tmp_path_factory.mktemp("collected")
        sums = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}\n"} for i in range(12)]
        texts = [{"text": f"a={i};b={i + 1};"} for i in range(10)]
        math, code = write_task(path / "math.jsonl", sums), write_task(path / "code.jsonl", texts)
        words = ["collect", "--model", model_dir, "--out", path / "run.fs", "-q", "--durability", "none"]
        words += ["--task", f"math={math}", "--task", f"code={code}", "--device", "cpu", *options]
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return path / "run.fs", result

    return collect


@pytest.fixture(scope="module")
def store(collect):
    return collect()[0]


@pytest.fixture
def broken(monkeypatch):
    """An analysis that fails, registered for one test."""
    registry: Registry = REGISTRY
    registry.names()
    monkeypatch.setattr(registry, "analyses", dict(registry.analyses))

    @registry.register("broken")
    def _broken(store, config, context):
        """Fails."""
        raise ZeroDivisionError("nothing to divide by")

    return "broken"


def test_report(store, run, tmp_path):
    """Every analysis in words, the files, and the page's path as the last line."""
    shown = run("analyze", store, "--out", tmp_path / "report")
    assert shown.exit_code == 0, shown.stderr
    for name in REGISTRY.names():
        assert name in shown.stdout
    assert "failed" not in shown.stdout
    assert shown.stdout.splitlines()[-1] == str(tmp_path / "report" / "report.html")
    assert {p.name for p in (tmp_path / "report").iterdir()} >= {"report.html", "results.json", "tables"}


def test_only(store, run, tmp_path):
    """The chosen analyses and no other."""
    shown = run("analyze", store, "-o", tmp_path / "report", "--only", "masks", "--only", "fisher")
    assert shown.exit_code == 0, shown.stderr
    assert "masks" in shown.stdout
    assert "interference" not in shown.stdout
    shown = run("analyze", store, "-o", tmp_path / "other", "--only", "bogus")
    assert shown.exit_code == 2
    assert "no analysis 'bogus'" in shown.stderr
    assert not (tmp_path / "other").exists()


def test_config(store, run, tmp_path):
    """Options by file reach the results."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tasks": ["code"], "masks": {"sparsities": [0.25]}}))
    shown = run("analyze", store, "-o", tmp_path / "report", "--only", "masks", "--config", config)
    assert shown.exit_code == 0, shown.stderr
    assert "25%" in shown.stdout
    assert "math" not in shown.stdout.partition("analyses")[2].replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"bogus": 1}', "no option 'bogus'"),
        ('{"masks": {"sparsities": [2]}}', "sparsities"),
        ('{"masks": 3}', "Invalid value"),
        ('{"tasks": ["nope"]}', "no task 'nope'"),
    ],
)
def test_wrong_config(store, run, tmp_path, content, message):
    """Wrong usage: 2, and no report."""
    config = tmp_path / "config.json"
    if content is not None:
        config.write_text(content)
    shown = run("analyze", store, "-o", tmp_path / "report", "--config", config)
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.replace("│", " ").split())
    assert not (tmp_path / "report").exists()


def test_a_failing_analysis(store, run, tmp_path, broken):
    """The others go on, the report is written, the error is named, and the exit code is 1."""
    shown = run("analyze", store, "-o", tmp_path / "report", "--only", "broken", "--only", "fisher")
    assert shown.exit_code == 1
    assert "nothing to divide by" in shown.stdout
    assert "failed: broken" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert "nothing to divide by" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert shown.stdout.splitlines()[-1].endswith("report.html")


def test_what_was_not_collected_is_skipped(collect, run, tmp_path):
    """Exit code 0, and what to collect is said."""
    store, _ = collect("--no-gradients", "--fisher", "groups")
    shown = run("analyze", store, "-o", tmp_path / "report")
    assert shown.exit_code == 0, shown.stderr
    assert "skipped" in shown.stdout
    assert "SampleGradients" in shown.stdout


def test_collect_and_report_at_once(collect, tmp_path):
    """--report analyzes what was collected."""
    _, result = collect("--report", tmp_path / "report")
    assert result.stdout.splitlines()[-1] == str(tmp_path / "report" / "report.html")
    assert (tmp_path / "report" / "report.html").exists()


@pytest.fixture
def no_analysis(monkeypatch):
    """Every analysis that runs fails the test."""

    def ran(*arguments, **options):
        raise AssertionError("an analysis ran")

    monkeypatch.setattr("fisherscope.report.report.run", ran)


def plain(text):
    return " ".join(text.replace("│", " ").split())


def test_a_report_that_cannot_be_written(store, run, tmp_path, no_analysis):
    """A file, a page that is a directory, and a directory of other things: refused before anything runs."""
    (tmp_path / "report").touch()
    (tmp_path / "x.html").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for name, message in (
        ("report", "is a file"), ("x.html", "is a directory"), ("other", "holds no report"),
    ):  # fmt: skip
        shown = run("analyze", store, "-o", tmp_path / name, "--only", "fisher")
        assert shown.exit_code == 2
        assert message in plain(shown.stderr)
        assert "--out" in shown.stderr
        assert "Traceback" not in shown.stderr
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_collect_looks_at_the_report_first(run, tasks, tmp_path):
    """--report in the way is refused before the model is loaded: the model here does not even exist."""
    (tmp_path / "report").touch()
    words = ["--model", tmp_path / "none", "--out", tmp_path / "run.fs", "--report", tmp_path / "report"]
    shown = run("collect", *words, *tasks)
    assert shown.exit_code == 2
    assert "is a file" in plain(shown.stderr)
    assert not (tmp_path / "run.fs").exists()


def test_a_page_alone(store, run, tmp_path):
    """A name with .html is the page, and the last line; the report can be written over."""
    for _ in range(2):
        shown = run("analyze", store, "-o", tmp_path / "x.html", "--only", "masks")
        assert shown.exit_code == 0, shown.stderr
        assert shown.stdout.splitlines()[-1] == str(tmp_path / "x.html")
    assert (tmp_path / "x.html").is_file()
    assert not (tmp_path / "tables").exists()


def test_progress(store, run, tmp_path):
    """One line per analysis with its seconds, and one for the report; nothing with --quiet."""
    words = ["analyze", store, "--only", "overlap", "--only", "fisher"]
    shown = run(*words, "-o", tmp_path / "report")
    seconds = r": \d+\.\d s"
    lines = [line for line in shown.stderr.splitlines() if re.search(seconds, line)]
    assert [line.split(":")[0] for line in lines] == [
        "analyze masks", "analyze overlap", "analyze fisher", f"report into {tmp_path / 'report'}",
    ]  # fmt: skip
    assert all(re.fullmatch(rf".*{seconds}", line) for line in lines)
    shown = run(*words, "-o", tmp_path / "report", "--quiet")
    assert shown.exit_code == 0
    assert not re.search(seconds, shown.stderr)
