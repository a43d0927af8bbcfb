"""A tiny model on disk, task files, and a runner."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging
from typer.testing import CliRunner

from fisherscope.cli import app


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A random Qwen2 with a character tokenizer, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("model")
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", "<pad>"]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=[],
        unk_token="<eos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    config = Qwen2Config(
        vocab_size=len(symbols),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    logging.disable_progress_bar()
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_task():
    """Writes rows as JSON lines and returns the path."""
    return write_rows


@pytest.fixture
def tasks(tmp_path):
    """Two small tasks: options for the command line."""
    sums = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}\n"} for i in range(12)]
    texts = [{"text": f"a={i};b={i + 1};"} for i in range(10)]
    math, code = write_rows(tmp_path / "math.jsonl", sums), write_rows(tmp_path / "code.jsonl", texts)
    return ["--task", f"math={math}", "--task", f"code={code}"]


@pytest.fixture(scope="session")
def run():
    """Runs a command line in this process; returns the result with exit_code, stdout and stderr."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})

    def run(*arguments):
        result = runner.invoke(app, [str(argument) for argument in arguments], prog_name="fisherscope")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def start():
    """Starts ``python -m fisherscope`` as a process of its own, which does not outlive the tests."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "fisherscope", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # one thread: threads of several processes that wait for each other cost ten times the work
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()
