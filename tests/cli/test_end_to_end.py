"""Commands on a tiny model: what they write, what they say, how they end."""

import json

import pytest

import fisherscope as fs


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory, write_task):
    """A collected store of two small tasks."""
    from typer.testing import CliRunner

    from fisherscope.cli import app

    path = tmp_path_factory.mktemp("finished")
    sums = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}\n"} for i in range(12)]
    texts = [{"text": f"a={i};b={i + 1};"} for i in range(10)]
    math, code = write_task(path / "math.jsonl", sums), write_task(path / "code.jsonl", texts)
    command = ["collect", "--model", model_dir, "--out", path / "run.fs", "-q", "--durability", "none"]
    command += ["--task", f"math={math}", "--task", f"code={code}", "--device", "cpu"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return path / "run.fs", [str(word) for word in command], result


def test_collect(finished):
    """Every row is in the store, loss where it belongs, and the table says how much."""
    path, _, result = finished
    store = fs.open_store(path)
    assert store.tasks == ["math", "code"]
    assert [store.n(task) for task in store.tasks] == [12, 10]
    samples = store.samples("math")
    assert samples["tokens"].tolist() == [len(f"{2 * i}\n") for i in range(12)]
    assert samples["text"][3] == "3+3=6\n"
    assert "loss-bearing tokens" in result.stdout
    assert result.stderr == ""


def test_the_same_command_again(finished, run):
    """Nothing is left to do, and the same table appears."""
    path, command, first = finished
    before = sorted((file.name, file.stat().st_mtime_ns) for file in (path / "shards").iterdir())
    again = run(*command)
    assert again.exit_code == 0
    assert [line.split() for line in again.stdout.splitlines()] == [
        line.split() for line in first.stdout.splitlines()
    ]
    assert sorted((file.name, file.stat().st_mtime_ns) for file in (path / "shards").iterdir()) == before


def test_another_run_into_the_same_directory(finished, run):
    """Refused, naming what differs; with --no-resume even the same run is."""
    path, command, _ = finished
    shown = run(*command, "--compute-dtype", "float64")
    assert shown.exit_code == 1
    assert "compute_dtype" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert run(*command, "--no-resume").exit_code == 1
    assert fs.open_store(path).n("math") == 12


def test_options_reach_the_collection(model_dir, tasks, tmp_path, run):
    """Each flag is in the options that the store remembers."""
    flags = {
        "--max-samples": 5,
        "--max-length": 9,
        "--fisher": "groups",
        "--normalization": "mean",
        "--dtype": "float32",
        "--compute-dtype": "float64",
        "--batch-size": 3,
        "--attn": "eager",
        "--parameters": "attention",
        "--gradient-parameters": "*.q_proj.weight",
        "--durability": "none",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    shown = run(
        "collect", "--model", model_dir, *tasks, "--out", tmp_path / "run.fs", "-q", "--no-store-text", *words
    )
    assert shown.exit_code == 0, shown.stderr
    store = fs.open_store(tmp_path / "run.fs")
    header = store.header
    assert store.n("math") == 5
    assert header.options["max_length"] == 9
    assert header.options["batch_size"] == 3
    assert header.options["compute_dtype"] == "float64"
    assert header.options["store_text"] is False
    assert (header.fisher_shape, header.normalization) == ("groups", "mean")
    assert header.gradient_dtype == "float32"
    assert header.gradient_parameters == tuple(
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    )
    assert all("self_attn" in name for name in header.parameters)
    assert header.provenance["attention"] == "eager"
    assert "text" not in store.samples("math")
    assert "warning" not in shown.stderr  # nothing is longer than 9 tokens


def test_encodings_reach_the_collection(model_dir, tasks, tmp_path, run):
    """How gradients are stored, and an estimate of it with what would take less."""
    flags = ["--encoding", "lowrank", "--gradient-rank", "2", "--dtype", "float16"]
    common = ["--model", model_dir, *tasks, "-q", "--batch-size", "4", *flags]
    assert run("collect", *common, "--out", tmp_path / "run.fs", "--durability", "none").exit_code == 0
    header = fs.open_store(tmp_path / "run.fs").header
    assert header.gradient_encodings["model.layers.0.self_attn.q_proj.weight"] == "lowrank"
    assert (header.gradient_rank, header.encodings.dtype) == (2, "float16")
    shown = run("estimate", *common, "--no-measure")
    assert shown.exit_code == 0, shown.stderr
    assert "groups" in shown.stdout
    assert run("collect", *common, "--gradient-rank", "0").exit_code == 2


def test_truncation_is_reported(model_dir, tasks, tmp_path, run):
    """How many samples of which task, and how many tokens."""
    shown = run(
        "collect", "--model", model_dir, *tasks, "--out", tmp_path / "run.fs", "-q", "--max-length", "7",
        "--no-gradients", "--durability", "none",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    # 10+10=20 has 9 tokens with its line end, a=1;b=2; has 8, a=9;b=10; has 9
    assert "task 'math': 2 of 12 samples were cut at --max-length; 4 tokens are gone" in shown.stderr
    assert "task 'code': 10 of 10 samples were cut at --max-length; 11 tokens are gone" in shown.stderr


def test_inspect(finished, run):
    """Tasks, sizes and origin in words; the same as JSON."""
    path, _, _ = finished
    shown = run("inspect", path)
    assert shown.exit_code == 0
    for word in ("math", "code", "qwen2", "gradients", "bfloat16", "total", "transformers"):
        assert word in shown.stdout
    facts = json.loads(run("inspect", path, "--json").stdout)
    assert facts["tasks"]["math"] == {"samples": 12, "committed": 12, "complete": True, "aggregated": 12}


@pytest.mark.parametrize("command", ["inspect", "analyze"])
def test_no_store(run, tmp_path, command):
    """A directory that is none, or is not there: 1, and no report."""
    for path in (tmp_path, tmp_path / "nowhere"):
        shown = run(command, path, *(["--out", tmp_path / "report"] if command == "analyze" else []))
        assert shown.exit_code == 1
        assert str(path) in shown.stderr
        assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ab"}\n{"text": }\n', "bad.jsonl, line 2: not valid JSON"),
        ('{"text": "ab"}\n\n{"foo": 1}\n', "bad.jsonl, line 3): unknown form"),
        ("", "the file holds no rows"),
        ('{"input_ids": [1, 99999]}\n', "the model's vocabulary has 258 entries"),
        ('{"input_ids": [1, 2], "labels": [-100, -100]}\n', "no loss-bearing token"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "no chat template"),
    ],
)
def test_bad_input(model_dir, tmp_path, run, content, message):
    """One message that names file and line; nothing is written."""
    (tmp_path / "bad.jsonl").write_text(content)
    shown = run(
        "collect", "--model", model_dir, "--task", f"t={tmp_path / 'bad.jsonl'}", "--out", tmp_path / "run.fs"
    )
    assert shown.exit_code == 1
    assert message in shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "run.fs").exists()


def test_a_missing_model_and_a_missing_file(tmp_path, tasks, model_dir, run):
    """Each is named."""
    shown = run("collect", "--model", tmp_path / "gone", *tasks, "--out", tmp_path / "run.fs")
    assert shown.exit_code == 1
    assert "no such directory" in shown.stderr
    shown = run("collect", "--model", model_dir, "--task", "a=gone.jsonl", "--out", tmp_path / "run.fs")
    assert shown.exit_code == 1
    assert "gone.jsonl: no such file" in shown.stderr


def test_a_directory_that_is_no_store_is_left_alone(tmp_path, tasks, model_dir, run):
    """Somebody's files are not ours."""
    (tmp_path / "run.fs").mkdir()
    (tmp_path / "run.fs" / "thesis.tex").write_text("x")
    shown = run("collect", "--model", model_dir, *tasks, "--out", tmp_path / "run.fs", "-q")
    assert shown.exit_code == 1
    assert [file.name for file in (tmp_path / "run.fs").iterdir()] == ["thesis.tex"]
