"""Whatever state torch, numpy and the process are in, numbers are those of a fresh process."""

from __future__ import annotations

import pytest

from tests.instrument import torch_states


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return torch_states.run(tmp_path_factory.mktemp("plain") / "run.fs")


def differing(found, expected):
    return [name for name in expected if found[name] != expected[name]]


@pytest.mark.parametrize("state", torch_states.STATES)
def test_numbers_are_the_same(state, plain, tmp_path):
    """Collecting, reading, computing again and analysing give the same bits under every state."""
    assert not differing(torch_states.run(tmp_path / "run.fs", torch_states.STATES[state]()), plain)
