"""Found, nothing found, or cannot tell: what the tests of a pair of tasks amount to, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fisherscope.analyses.conflict.study import Study
from fisherscope.words import counted, several

# Means above this are called small.
_SLIGHT = -0.05

FOUND, NOTHING, UNKNOWN = "found", "nothing found", "cannot tell"


@dataclass(frozen=True)
class Findings:
    """How much each test found for a pair of tasks.

    Attributes:
        pairs: pairs of samples that are called over all attention weights.
        heads: pairs that are called on some head slice.
        samples: samples of either task that oppose the other as a whole.
        opposed: their mean cosine with it; NaN where there are none.
        corroborated: whether they are more than half of a symmetric spread, or the tasks oppose each other
            on average.
        blocks: head slices on which the mean cosine is below the margin.
        lowest: the lowest of these means; NaN where there are none.
        whole: mean cosine over all attention weights, where it is below the margin; else NaN.
    """

    pairs: int
    heads: int
    samples: tuple[int, int]
    opposed: tuple[float, float]
    corroborated: tuple[bool, ...]
    blocks: int
    lowest: float
    whole: float

    @property
    def any(self) -> bool:
        """Whether anything was found."""
        samples = any(n and sure for n, sure in zip(self.samples, self.corroborated, strict=True))
        return bool(self.pairs or self.heads or samples or self.blocks or not np.isnan(self.whole))

    @property
    def is_slight(self) -> bool:
        """Whether all that was found are means, and none of them is below -.05."""
        opposed = [mean for mean, sure in zip(self.opposed, self.corroborated, strict=True) if sure]
        means = [*opposed, self.lowest, self.whole]
        return not self.pairs and not self.heads and not any(mean < _SLIGHT for mean in means)


def verdict(study: Study, findings: Findings, a: str, b: str) -> dict[str, Any]:
    """Columns verdict, slight, reason, pairs, heads, samples, blocks, detectable for a pair of tasks."""
    calibration = study.calibration.verdicts()
    notes = [str(v) for v in calibration if v.withheld]
    wanted = study.config.calibration_splits > 0
    untried = [_UNTRIED] if wanted and not any(v.splits for v in calibration) else []
    testable = bool(np.isfinite(study.p).any())
    if findings.any:
        word, sentences = FOUND, _found(study, findings, a, b)
    elif notes or not testable or np.isnan(study.detectable):
        word, sentences = UNKNOWN, [] if notes else [_no_pairs(study)]
    else:
        sentence = (
            f"No test found a conflict between {a} and {b}. Several pairs of samples with a cosine below "
            f"about {study.detectable:.2f} would most likely have been found; weaker ones, or one or two, "
            "may be there."
        )
        word, sentences = NOTHING, [sentence]
    return {
        "verdict": word,
        "slight": findings.any and findings.is_slight,
        "reason": " ".join([*sentences, *_one_sided(findings, a, b), *_as_sentences(notes), *untried]),
        "pairs": findings.pairs,
        "heads": findings.heads,
        "samples": sum(findings.samples),
        "blocks": findings.blocks,
        "detectable": study.detectable,
    }


_UNTRIED = (
    "The tests were not tried on random halves of the tasks, so that nothing vouches for them here: that "
    "takes eight samples of one task."
)


def _as_sentences(notes: list[str]) -> list[str]:
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def _one_sided(findings: Findings, a: str, b: str) -> list[str]:
    """Samples that oppose the other task where as many agree with it."""
    sides = zip(findings.samples, findings.corroborated, (a, b), (b, a), strict=True)
    return [
        f"{counted(count, 'sample')} of {one} {several(count, 'leans', 'lean')} against {other}, but others "
        "lean towards it as far: that is no conflict of the tasks."
        for count, sure, one, other in sides
        if count and not sure
    ]


def nothing_stored(a: str, b: str, empty: list[str]) -> dict[str, Any]:
    """The same where gradients of one of the tasks are not stored."""
    names = " and ".join(map(repr, empty))
    return {
        "verdict": UNKNOWN,
        "slight": False,
        "reason": f"No gradients of {names} are stored, so nothing can be said of {a} and {b}.",
        "pairs": 0,
        "heads": 0,
        "samples": 0,
        "blocks": 0,
        "detectable": float("nan"),
    }


def _found(study: Study, findings: Findings, a: str, b: str) -> list[str]:
    sentences = []
    if findings.pairs:
        sentences.append(
            f"{counted(findings.pairs, 'pair')} of {study.p.size:,} "
            f"{several(findings.pairs, 'conflicts', 'conflict')} over all attention weights."
        )
    if findings.heads:
        sentences.append(
            f"{counted(findings.heads, 'pair')} "
            f"{several(findings.heads, 'conflicts', 'conflict')} on some head."
        )
    sides = zip(findings.samples, findings.opposed, findings.corroborated, (a, b), (b, a), strict=True)
    for count, mean, sure, one, other in sides:
        if count and sure:
            verb = several(count, "opposes", "oppose")
            sentences.append(
                f"{counted(count, 'sample')} of {one} {verb} {other} as a whole (mean cosine {mean:.3f})."
            )
    if not np.isnan(findings.whole):
        sentences.append(f"On average {a} and {b} oppose each other (mean cosine {findings.whole:.3f}).")
    if findings.blocks:
        sentences.append(
            f"On {findings.blocks} of {counted(len(study.slices), 'head slice')} the mean cosine is below "
            f"what groups of samples of one task have (down to {findings.lowest:.3f})."
        )
    if findings.is_slight:
        sentences.append("These effects are small: a step on one task hardly moves the other.")
    if not findings.pairs and not findings.heads:
        sentences.append("Which pairs of samples are in conflict cannot be told: " + _why_no_pairs(study))
    return sentences


def _why_no_pairs(study: Study) -> str:
    if study.verdict("pairs").withheld:
        return "the test of pairs is not calibrated here."
    if np.isnan(study.detectable):
        return _no_pairs(study)
    return f"none stands out of the noise (about {study.detectable:.2f} would)."


def _no_pairs(study: Study) -> str:
    if not np.isfinite(study.p).any():
        return "the test of pairs needs four different samples (or windows) with a gradient in each task."
    return (
        "samples of one task differ so much that not even opposite gradients would stand out; collect more."
    )
