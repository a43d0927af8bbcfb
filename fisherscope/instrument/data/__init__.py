"""Task rows to samples: text, prompts, chats, token ids and batches, with loss where it belongs."""

from fisherscope.instrument.data.jsonl import JsonlRow, read_jsonl
from fisherscope.instrument.data.prepare import prepare_task
from fisherscope.instrument.data.reaching import refuse_unread
from fisherscope.instrument.data.reading import Encoder, Reading
from fisherscope.instrument.data.sample import IGNORED, Labelling, Sample
from fisherscope.instrument.data.task_files import read_task_file

__all__ = [
    "IGNORED",
    "Encoder",
    "JsonlRow",
    "Labelling",
    "Reading",
    "Sample",
    "prepare_task",
    "read_jsonl",
    "read_task_file",
    "refuse_unread",
]
