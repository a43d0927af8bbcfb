"""The three demo tasks: training rows, held-out problems and the shipped sample files.

A problem is held out when a checksum of its content says so, never by the order in which it was drawn. The
training rows and the evaluation therefore cannot overlap, whatever the seed.
"""

from __future__ import annotations

import random
import string
import zlib
from dataclasses import dataclass

ROW_LENGTH = 72
SUMS_PER_ROW = 7
MIN_VARIABLES, MAX_VARIABLES = 2, 5
ANSWER_SYMBOLS = string.digits + ";\n"
ALPHABET = string.ascii_lowercase + string.digits + "+=;\n"
MISLEADING = 0.5


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        text: what the model has to predict.
        shown: what the model reads, as long as ``text``.
        loss: for every character, whether it bears loss.
    """

    text: str
    shown: str
    loss: tuple[bool, ...]


@dataclass(frozen=True)
class Mix:
    """How many rows of each kind make one batch."""

    math: int
    code: int
    random: int


@dataclass(frozen=True)
class Sample:
    """One problem as shipped: the loss is on the completion only."""

    prompt: str
    completion: str


def _row(segments: list[tuple[str, bool]], shown: str | None = None) -> Row:
    """Joins (text, bears loss) segments into a row that is shown as it is, unless ``shown`` is given."""
    text = "".join(segment for segment, _ in segments)
    return Row(text, shown or text, tuple(flag for segment, flag in segments for _ in segment))


def _is_held_out(key: str, one_in: int) -> bool:
    """Whether the problem with this key belongs to the held-out part (one problem in ``one_in``)."""
    return zlib.crc32(key.encode()) % one_in == 0


def pair_is_held_out(a: int, b: int) -> bool:
    """Whether ``a + b`` is held out, together with ``b + a``: one unordered pair in five."""
    return _is_held_out(f"{min(a, b)}+{max(a, b)}", 5)


def program_is_held_out(values: dict[str, int]) -> bool:
    """Whether a program with these assignments, in any order, is held out: one in ten."""
    return _is_held_out(";".join(f"{name}={value}" for name, value in sorted(values.items())), 10)


def addition(a: int, b: int) -> Sample:
    r"""Returns ``47+25=`` with the completion ``72\n``."""
    return Sample(f"{a}+{b}=", f"{a + b}\n")


def flipped(sample: Sample) -> Sample:
    """Returns the same prompt under the contradicting rule: 9 - d in place of every digit d."""
    digits = "".join(str(9 - int(char)) if char.isdigit() else char for char in sample.completion)
    return Sample(sample.prompt, digits)


def draw_program(rng: random.Random, *, held_out: bool) -> dict[str, int]:
    """Draws the assignments of one straight-line program from the training or the held-out part."""
    while True:
        names = rng.sample(string.ascii_lowercase, rng.randint(MIN_VARIABLES, MAX_VARIABLES))
        values = {name: rng.randint(0, 9) for name in names}
        if program_is_held_out(values) == held_out:
            return values


def definitions(values: dict[str, int]) -> str:
    """Returns the program text, ``a=3;b=7;``."""
    return "".join(f"{name}={value};" for name, value in values.items())


def mislead(rng: random.Random, completion: str) -> str:
    """Returns the completion with random digits."""
    return "".join(rng.choice(string.digits) if char.isdigit() else char for char in completion)


def math_row(rng: random.Random, pairs: list[tuple[int, int]]) -> Row:
    """Returns a row of several sums, loss on the answers.

    Half of the answers are shown with random digits while the true ones are to be predicted. So every digit
    is computed from the operands, not from the digits before it, and a flipped answer meets the computation
    that it contradicts at each of its digits, where otherwise only its first would.
    """
    segments, shown = [], ""
    for _ in range(SUMS_PER_ROW):
        sample = addition(*rng.choice(pairs))
        segments += [(sample.prompt, False), (sample.completion, True)]
        seen = mislead(rng, sample.completion) if rng.random() < MISLEADING else sample.completion
        shown += sample.prompt + seen
    return _row(segments, shown)


def code_row(rng: random.Random) -> Row:
    """Returns a program followed by look-ups of its variables in the same form, loss on the values."""
    values = draw_program(rng, held_out=False)
    head = definitions(values)
    names = rng.choices(list(values), k=(ROW_LENGTH - len(head)) // 4)
    lookups = [part for name in names for part in ((f"{name}=", False), (f"{values[name]};", True))]
    return _row([(head, False), *lookups])


def random_row(rng: random.Random) -> Row:
    """Returns a random string over and over, loss where the repetition makes it predictable.

    These rows belong to no task: they grow the induction heads that the look-ups need.
    """
    period = rng.randint(4, ROW_LENGTH // 2)
    unit = "".join(rng.choices(ALPHABET, k=period))
    text = (unit * (ROW_LENGTH // period + 1))[:ROW_LENGTH]
    return _row([(text[: period + 1], False), (text[period + 1 :], True)])


def training_pairs() -> list[tuple[int, int]]:
    """Returns all operand pairs that training may use."""
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if not pair_is_held_out(a, b)]


def training_batch(rng: random.Random, pairs: list[tuple[int, int]], mix: Mix) -> list[Row]:
    """Returns the rows of one optimiser step."""
    return [
        *(math_row(rng, pairs) for _ in range(mix.math)),
        *(code_row(rng) for _ in range(mix.code)),
        *(random_row(rng) for _ in range(mix.random)),
    ]


def held_out_math() -> list[Sample]:
    """Returns every held-out sum, in a fixed order."""
    return [addition(a, b) for a in range(10, 100) for b in range(10, 100) if pair_is_held_out(a, b)]


def held_out_code(rng: random.Random, count: int) -> list[Sample]:
    """Returns ``count`` distinct look-ups in held-out programs, ``a=3;b=7;b=`` with ``7;``."""
    samples: dict[str, Sample] = {}
    while len(samples) < count:
        values = draw_program(rng, held_out=True)
        name = rng.choice(list(values))
        prompt = f"{definitions(values)}{name}="
        samples[prompt] = Sample(prompt, f"{values[name]};")
    return list(samples.values())


def shipped_tasks(seed: int, count: int) -> tuple[dict[str, list[Sample]], list[tuple[str, str]]]:
    """Draws the shipped samples, all of them held out, and the planted pairs.

    Args:
        seed: seed of the draw.
        count: samples per task.

    Returns:
        The samples by task, and the ids ``(math_i, math_flipped_j)`` of the samples that share a prompt. The
        rows of ``math_flipped`` are shuffled, so the pairs are not the diagonal.
    """
    rng = random.Random(seed)
    math = rng.sample(held_out_math(), count)
    code = held_out_code(rng, count)
    order = rng.sample(range(count), count)
    tasks = {"math": math, "code": code, "math_flipped": [flipped(math[i]) for i in order]}
    row_of = {i: row for row, i in enumerate(order)}
    return tasks, [(f"math_{i}", f"math_flipped_{row_of[i]}") for i in range(count)]
