"""Random malformed rows, options and files: refused by name with exit code 1 or 2, and nothing is left."""

import contextlib
import dataclasses
import gzip
import json
import os
import random

import numpy as np
import pytest
import torch

import fisherscope as fs
from fisherscope.errors import FisherscopeError
from tests import models

VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "\x00",
    "a\nb",
    "=1+1",
    "x" * 5000,
    [],
    [[]],
    [None],
    ["a"],
    [1, [2]],
    [1.0, 2.5],
    [-5],
    [10**30],
    {},
    {"a": 1},
    [1] * 3000,
    b"bytes",
    ...,
    object(),
    np.array([[1, 2]]),
    np.array(["a"]),
    np.float32("nan"),
    torch.zeros(2, 2),
    torch.tensor([1.5]),
]
KEYS = ["input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "text", "prompt", "label"]
OPTIONS = [
    "extensions",
    "objective",
    "max_length",
    "max_samples",
    "batch_size",
    "memory_budget",
    "compute_dtype",
    "durability",
    "deterministic",
    "resume",
    "rank",
    "world_size",
    "seed",
    "force",
    "check",
    "store_text",
]


@pytest.fixture(scope="module")
def scope():
    return fs.wrap(models.build(models.named("llama")))


def refusal(scope, tasks, out, **options):
    """What the error says, with nothing left behind; nothing where all is collected."""
    try:
        store = scope.collect(tasks, out, quiet=True, **options)
    except FisherscopeError as error:
        found = str(error)
    else:
        assert all(store.is_complete(task) for task in store.tasks)
        return ""
    assert not out.exists()
    return found


@pytest.mark.filterwarnings("ignore:.*single sample")
def test_random_rows(scope, tmp_path):
    """One value of one row is something else: a message that names the row, or a sample like any other."""
    draw, count = random.Random(0), 0
    for number in range(120):
        rows = [dict(row) for row in models.rows(3)]
        place = draw.randrange(3)
        for _ in range(draw.randint(1, 2)):
            rows[place][draw.choice(KEYS)] = draw.choice(VALUES)
        if draw.random() < 0.2:
            rows[place] = draw.choice(VALUES)
        out = tmp_path / f"{number}.fs"
        message = refusal(scope, {"a": rows}, out)
        assert not message or f"a_{place}" in message, (rows[place], message)
        count += bool(message)
    assert count > 80


@pytest.mark.filterwarnings("ignore:.*single sample")
def test_random_tasks(scope, tmp_path):
    """Tasks that are something else than rows, under names that are something else than names."""
    draw = random.Random(1)
    for number in range(60):
        names = [draw.choice(VALUES) if draw.random() < 0.5 else "a"]
        tasks = {name: draw.choice(VALUES) for name in names if getattr(name, "__hash__", None)}
        if draw.random() < 0.3:
            tasks = draw.choice(VALUES)
        out = tmp_path / f"{number}.fs"
        message = refusal(scope, tasks, out)
        assert not message or len(message) > 15, (tasks, message)


def test_random_options(scope, tmp_path):
    """One or two options are something that they cannot be: the message names one of them."""
    draw = random.Random(2)
    for number in range(120):
        chosen = {draw.choice(OPTIONS): draw.choice(VALUES) for _ in range(draw.randint(1, 2))}
        out = tmp_path / f"{number}.fs"
        message = refusal(scope, {"a": models.rows(3)}, out, **chosen)
        words = {"extension", "objective", "rank", "memory", *chosen}
        assert not message or any(word in message for word in words), (chosen, message)


def test_random_extensions(scope, tmp_path):
    """An option of an extension is something that it cannot be: the message names the extension."""
    draw = random.Random(5)
    kinds = [fs.Fisher, fs.SampleGradients, fs.Kronecker, fs.Positions, fs.ExactPerToken]
    for number in range(150):
        kind = draw.choice(kinds)
        name = draw.choice([f.name for f in dataclasses.fields(kind) if f.init])
        value = draw.choice(VALUES)
        try:
            extension = kind(**{name: value})
        except FisherscopeError as error:
            message = str(error)
        else:
            message = refusal(
                scope, {"a": models.rows(3)}, tmp_path / f"{number}.fs", extensions=(extension,)
            )
        assert not message or kind.__name__ in message, (kind, name, value, message)


def test_random_options_of_analyses():
    """The message names the option."""
    draw, settings = random.Random(6), fs.AnalyzeConfig()
    for _ in range(300):
        part = draw.choice([field.name for field in dataclasses.fields(settings)])
        inner, value = getattr(settings, part), draw.choice(VALUES)
        name = part  # of the option
        if dataclasses.is_dataclass(inner):
            name = draw.choice([field.name for field in dataclasses.fields(inner)])
            value = {name: value}
        try:
            fs.AnalyzeConfig.from_dict({part: value})
        except FisherscopeError as error:
            message = str(error)
        else:
            continue
        assert name in message or "option" in message, (name, value, message)


def _files(draw, path):
    """A file that is no task, or one with a damaged line."""
    good = "".join(json.dumps({"text": f"a={i};"}) + "\n" for i in range(4)).encode()
    kind = draw.randrange(9)
    if kind == 0:
        path.write_bytes(draw.randbytes(draw.randrange(300)))
    elif kind == 1:
        path.write_bytes(gzip.compress(good)[: draw.randrange(1, 40)])
    elif kind == 2:
        place = draw.randrange(len(good))
        path.write_bytes(good[:place] + draw.randbytes(3) + good[place:])
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to(path.parent / "nowhere")
    elif kind == 5:
        path.write_text('{"text": ' + "[" * 100_000 + "\n")
    elif kind == 6:
        path.write_text('{"input_ids": [1, ' + "9" * 6000 + "]}\n")
    elif kind == 7:
        path.write_bytes(b"PAR1" + draw.randbytes(50))
    else:
        path.write_text(json.dumps(draw.choice([1, "a", None, [[]], {"text": 5}, {}, {"prompt": "a"}])))


def test_random_files_on_the_command_line(model_dir, run, tmp_path):
    """Exit code 1 or 2, one message that names the file, no traceback, no store."""
    draw = random.Random(3)
    for number in range(30):
        path = tmp_path / f"{number}.jsonl"
        _files(draw, path)
        out = tmp_path / f"{number}.fs"
        result = run("collect", "--model", model_dir, "--task", f"a={path}", "--out", out, "--quiet")
        assert result.exit_code in {0, 1, 2}
        assert "Traceback" not in result.stderr
        if result.exit_code:
            assert path.name in result.stderr or "a_" in result.stderr, result.stderr
            assert not out.exists()


def test_random_options_on_the_command_line(model_dir, tasks, run, tmp_path):
    """Options with values that they cannot have: exit code 2, and the option is named."""
    draw = random.Random(4)
    options = {
        "--task": ["a", "=x.jsonl", "a=", "a=nowhere.jsonl", "\x00=b"],
        "--batch-size": ["0", "-3", "many", "1.5"],
        "--max-length": ["0", "-1", "x"],
        "--max-samples": ["0", "x"],
        "--memory-budget": ["0", "much", "-1GB", "1XB"],
        "--check": ["always", ""],
        "--rank": ["5", "-1", "x"],
        "--world-size": ["0", "x", "99999"],
        "--seed": ["x", str(10**30)],
        "--objective": ["nothing", ""],
        "--parameters": ["*nothing*", ""],
        "--gradient-parameters": ["*nothing*"],
        "--device": ["abacus", "cuda:99"],
        "--labels": ["mine"],
        "--gradient-rank": ["0", "-1"],
        "--durability": ["forever"],
    }
    for number in range(50):
        name = draw.choice(list(options))
        out = tmp_path / f"{number}.fs"
        result = run(
            "collect", "--model", model_dir, *tasks, "--out", out, "--quiet", name, draw.choice(options[name])
        )
        assert result.exit_code in {1, 2}, (name, result.stdout)
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip()) > 15
        assert not out.exists()


def test_what_has_no_end(scope, tmp_path, run, model_dir):
    """A device that never ends, and a pipe, which ends and is read once."""
    result = run("collect", "--model", model_dir, "--task", "a=/dev/zero", "--out", tmp_path / "z.fs")
    assert result.exit_code == 1
    assert "/dev/zero, line 1: longer than 64 MiB" in result.stderr
    reading, writing = os.pipe()
    content = "".join(json.dumps(row) + "\n" for row in models.rows(9)).encode()
    with contextlib.closing(os.fdopen(writing, "wb")) as pipe:
        pipe.write(content)
    store = scope.collect({"a": f"/dev/fd/{reading}"}, tmp_path / "p.fs", quiet=True)
    os.close(reading)
    assert store.committed("a") == 9
