"""Options: validation, and the way to plain data and back."""

import json

import pytest

from fisherscope.analyses import (
    AnalyzeConfig,
    ConflictConfig,
    FisherConfig,
    ImportanceConfig,
    InterferenceConfig,
    MasksConfig,
    OverlapConfig,
)


def test_round_trip_through_json():
    """Every option survives ``to_dict`` -> JSON -> ``from_dict``."""
    config = AnalyzeConfig(
        tasks=("b", "a"),
        seed=3,
        fisher=FisherConfig(confidence=0.9, bootstrap_kinds=("head",)),
        masks=MasksConfig(sparsities=(0.9, 0.25), scope="layer"),
        interference=InterferenceConfig(aggregate="sum", max_samples_per_task=5),
    )
    assert AnalyzeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_sparsities_are_sorted_and_unique():
    """The order in which sparsities are given does not matter."""
    assert MasksConfig(sparsities=[0.9, 0.5, 0.9]).sparsities == (0.5, 0.9)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: FisherConfig(confidence=1.0), ["FisherConfig.confidence=1.0"]),
        (lambda: FisherConfig(ema_decay=1.0), ["ema_decay"]),
        (lambda: FisherConfig(bootstrap=-1), ["bootstrap=-1", "at least 0"]),
        (lambda: FisherConfig(bootstrap_kinds=("heads",)), ["bootstrap_kinds", "head, channel"]),
        (lambda: ImportanceConfig(kinds="head"), ["kinds", "list"]),
        (lambda: ImportanceConfig(top_k=0), ["top_k=0"]),
        (lambda: MasksConfig(sparsities=()), ["sparsities"]),
        (lambda: MasksConfig(sparsities=(1.5,)), ["sparsities", "between 0 and 1"]),
        (lambda: MasksConfig(scope="model"), ["scope='model'", "global, layer"]),
        (lambda: OverlapConfig(low=0.8), ["low=0.8", "high"]),
        (lambda: ConflictConfig(epsilon=0.0), ["epsilon=0.0"]),
        (lambda: ConflictConfig(max_samples_per_task=0), ["max_samples_per_task=0"]),
        (lambda: InterferenceConfig(fisher_pool="a"), ["fisher_pool='a'", "A, B, pooled"]),
        (lambda: InterferenceConfig(ridge=float("nan")), ["ridge=nan"]),
        (lambda: AnalyzeConfig(tasks=()), ["tasks=()"]),
        (lambda: AnalyzeConfig(tasks=("a", "a")), ["each once"]),
        (lambda: AnalyzeConfig(memory_budget=1), ["memory_budget=1"]),
        (lambda: AnalyzeConfig.from_dict({"fishr": {}}), ["fishr", "fisher, importance"]),
        (lambda: AnalyzeConfig.from_dict({"fisher": {"decay": 1}}), ["FisherConfig", "decay", "ema_decay"]),
    ],
)
def test_bad_options_name_option_and_cause(make, names):
    """A bad option is an error that names the option, its value or what is allowed."""
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    assert all(name in str(caught.value) for name in names), str(caught.value)
