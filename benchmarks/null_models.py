"""Synthetic per-sample gradients of two tasks that do not conflict, and conflicts planted into them.

Every model returns raw gradients ``[n, 1152]`` of two tasks, of 12 groups of 96 coordinates each. What all of
them share is that no sample of one task opposes a sample of the other beyond what chance, or the structure
that both tasks share, gives. S1 to S8 are the nulls that the tests were designed on; ``heavy``,
``realistic`` and ``rare`` are fresh: written down before a test was run on them, to report and not to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[np.random.Generator, int], tuple[Array, Array]]

GROUPS = 12
WIDTH = 96
D = GROUPS * WIDTH


def student(rng: np.random.Generator, df: float, shape: tuple[int, ...]) -> Array:
    """Student-t numbers; divided by their standard deviation where there is one."""
    return rng.standard_t(df, shape) * (np.sqrt((df - 2) / df) if df > 2 else 1.0)


def unit(x: Array) -> Array:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Population:
    """Heavy-tailed, heteroscedastic, correlated gradients.

    Attributes:
        scale: standard deviation of each coordinate.
        factors: ``[k, D]``, entries of size 1; half of them live in one group.
        share: of the variance that the factors carry.
        df, score_df: of the Student-t coordinates and factor scores.
        norm_sd: standard deviation of the logarithm of a sample's norm.
    """

    scale: Array
    factors: Array
    share: float
    df: float
    score_df: float
    norm_sd: float

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        *,
        log_sd: float = 1.5,
        factors: int = 10,
        share: float = 0.3,
        df: float = 3.0,
        score_df: float = np.inf,
        norm_sd: float = 0.7,
    ) -> Population:
        """A population with random coordinate scales and factors."""
        loadings = rng.standard_normal((factors, D))
        for k in range(factors // 2):
            group = int(rng.integers(GROUPS)) * WIDTH
            local = np.zeros(D)
            local[group : group + WIDTH] = loadings[k, group : group + WIDTH] * np.sqrt(GROUPS)
            loadings[k] = local
        return cls(np.exp(log_sd * rng.standard_normal(D)), loadings, share, df, score_df, norm_sd)

    def samples(self, rng: np.random.Generator, n: int) -> Array:
        """Gradients ``[n, D]`` with mean 0."""
        noise = student(rng, self.df, (n, D)) if np.isfinite(self.df) else rng.standard_normal((n, D))
        k = len(self.factors)
        if k:
            shape = (n, k)
            finite = np.isfinite(self.score_df)
            scores = student(rng, self.score_df, shape) if finite else rng.standard_normal(shape)
            common = scores @ self.factors / np.sqrt(k)
            noise = np.sqrt(1 - self.share) * noise + np.sqrt(self.share) * common
        return noise * self.scale * np.exp(self.norm_sd * rng.standard_normal((n, 1)))


def s1(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Independent Gaussian coordinates."""
    return rng.standard_normal((n, D)), rng.standard_normal((n, D))


def s2(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Heavy-tailed coordinates of very different size, norms that vary."""
    population = Population.draw(rng, factors=0)
    return population.samples(rng, n), population.samples(rng, n)


def s3(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """S2 with 10 factors that carry 30 % of the variance."""
    population = Population.draw(rng)
    return population.samples(rng, n), population.samples(rng, n)


def s4(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """S3 with residual signs, g = +-phi + noise: half of all pairs, within and across, oppose each other."""
    population = Population.draw(rng)
    phi = unit(rng.standard_normal(D)) * population.scale

    def task() -> Array:
        noise = population.samples(rng, n)
        size = np.linalg.norm(noise / population.scale, axis=1, keepdims=True)
        return noise + 0.6 * size * phi * rng.choice([-1.0, 1.0], (n, 1))

    return task(), task()


def s5(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """S3 with coherent tasks whose means live on different coordinates: different, but not in conflict.

    Means that share coordinates would not stay orthogonal when F, which contains them, divides.
    """
    population = Population.draw(rng)
    half = rng.permutation(D) < D // 2
    means = unit(rng.standard_normal(D) * np.array([half, ~half])) * population.scale

    def task(mean: Array) -> Array:
        noise = population.samples(rng, n)
        return noise + 0.6 * np.linalg.norm(noise / population.scale, axis=1, keepdims=True) * mean

    return task(means[0]), task(means[1])


def s6(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Two populations with scales and factors of their own."""
    return tuple(Population.draw(rng).samples(rng, n) for _ in range(2))  # type: ignore[return-value]


def s7(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """S3 where a fifth of the samples of each task are near copies of others (cosine about .9)."""
    population = Population.draw(rng)

    def task() -> Array:
        samples = population.samples(rng, n)
        copies = n // 5
        other = population.samples(rng, copies)
        source = samples[:copies] / np.linalg.norm(samples[:copies] / population.scale, axis=1, keepdims=True)
        other /= np.linalg.norm(other / population.scale, axis=1, keepdims=True)
        samples[copies : 2 * copies] = source + 0.45 * other
        return samples

    return task(), task()


def s8(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """S3 where B has a subspace of its own (3 factors, half of the variance), and so have 8 samples of A."""
    population = Population.draw(rng)
    own = unit(rng.standard_normal((3, D)))

    def bent(samples: Array) -> Array:
        size = np.linalg.norm(samples / population.scale, axis=1, keepdims=True)
        return samples + size * (rng.standard_normal((len(samples), 3)) @ own / np.sqrt(3)) * population.scale

    first, second = population.samples(rng, n), bent(population.samples(rng, n))
    first[:8] = bent(first[:8])
    return first, second


def heavy(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Heavier than S3: scores and coordinates without a variance, wider scales, stronger factors."""
    population = Population.draw(rng, log_sd=2.0, factors=12, share=0.5, df=2.0, score_df=2.0, norm_sd=1.0)
    return population.samples(rng, n), population.samples(rng, n)


def realistic(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """What a language model's gradients look like: sums over tokens, a steep spectrum, topics.

    A sample has T tokens (log-normal, 4 to 512) and one of 8 topics, which both tasks share in proportions of
    their own. Its gradient is the sum of its tokens': topic mean + noise in 80 directions with variances
    ~ k^-1.2, + white noise; the noise of a sample carries a Student-t(3) amplitude per direction. Divided by
    sqrt(T), the topic stands out more in long samples than in short ones.
    """
    directions = unit(rng.standard_normal((80, D)))
    spectrum = np.arange(1, 81) ** -0.6
    scale = np.exp(1.0 * rng.standard_normal(D))
    topics = rng.standard_normal((8, 80)) * spectrum * 0.12

    def task() -> Array:
        tokens = np.clip(np.exp(3.8 + 0.9 * rng.standard_normal((n, 1))), 4, 512)
        weights = rng.dirichlet(np.full(8, 1.5))
        topic = topics[rng.choice(8, n, p=weights)]
        noise = student(rng, 3.0, (n, 80)) * spectrum
        low = (np.sqrt(tokens) * topic + noise) @ directions
        white = 0.4 * np.sqrt((spectrum**2).sum() / D) * student(rng, 4.0, (n, D))
        return (low + white) * scale * np.exp(0.3 * rng.standard_normal((n, 1)))

    return task(), task()


def rare(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Samples that share rare tokens: sums of residuals over tokens from Zipf's law.

    400 tokens with probability ~ 1 / k have a direction each. An occurrence adds it with a random sign and a
    size that is log-normal and larger for rarer tokens (~ k^0.4). Two samples that happen to share a token
    that few others have are strongly aligned, or strongly opposed, within a task as across.
    """
    directions = unit(rng.standard_normal((400, D)))
    k = np.arange(1, 401)
    probability = (1 / k) / (1 / k).sum()
    scale = np.exp(1.0 * rng.standard_normal(D))

    def task() -> Array:
        lengths = np.clip(np.exp(3.0 + 0.7 * rng.standard_normal(n)), 4, 200).astype(int)
        weights = np.zeros((n, 400))
        for row, length in zip(weights, lengths, strict=True):
            tokens = rng.choice(400, length, p=probability)
            size = np.exp(rng.standard_normal(length)) * k[tokens] ** 0.4
            np.add.at(row, tokens, size * rng.choice([-1.0, 1.0], length))
        low = weights @ directions
        white = 0.3 * np.linalg.norm(low, axis=1, keepdims=True) / np.sqrt(D)
        return (low + white * student(rng, 4.0, (n, D))) * scale

    return task(), task()


MODELS: dict[str, Model] = {
    "S1": s1, "S2": s2, "S3": s3, "S4": s4, "S5": s5, "S6": s6, "S7": s7, "S8": s8,
    "heavy": heavy, "realistic": realistic, "rare": rare,
}  # fmt: skip


def plant(
    rng: np.random.Generator, first: Array, second: Array, kind: str, strength: float
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Add conflicts of a known place.

    Args:
        rng: source of the directions.
        first, second: raw gradients of the tasks.
        kind: "pairs": 0.3 % of all pairs, no sample in two of them, each along a direction of its own;
            "cluster": 8 samples of the first task against 8 of the second, along one direction.
        strength: length of what is added, as a multiple of the sample's own; without other structure the
            mean cosine becomes -strength^2 / (1 + strength^2).

    Returns:
        Both gradients, and which pairs are in conflict ``[n_a, n_b]``.
    """
    scale = np.sqrt((np.mean(first**2, 0) + np.mean(second**2, 0)) / 2)
    truth = np.zeros((len(first), len(second)), bool)
    if kind == "pairs":
        count = round(0.003 * truth.size)
        rows, columns = (rng.permutation(len(x))[:count] for x in (first, second))
        directions = unit(rng.standard_normal((count, D)))
        truth[rows, columns] = True
    else:
        rows, columns = (rng.permutation(len(x))[:8] for x in (first, second))
        directions = unit(rng.standard_normal((1, D)))
        truth[np.ix_(rows, columns)] = True
    first, second = first.copy(), second.copy()
    for samples, chosen, sign in ((first, rows, 1), (second, columns, -1)):
        size = np.linalg.norm(samples[chosen] / scale, axis=1, keepdims=True)
        samples[chosen] += sign * strength * size * directions * scale
    return first, second, truth


def natural(first: Array, second: Array) -> tuple[Array, Array]:
    """Unit natural gradients of both tasks, with F estimated on these very samples."""
    fisher = (np.mean(first**2, 0) + np.mean(second**2, 0)) / 2
    scale = np.sqrt(fisher + 1e-6 * np.median(fisher))
    return unit(first / scale), unit(second / scale)
