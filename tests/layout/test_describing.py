"""A layout in a few lines."""

from dataclasses import replace

import pytest

from fisherscope.layout import ModelLayout, SharedModule


def test_print_is_a_few_lines_and_repr_is_one(layout):
    """What the model is in one line, then heads, blocks and MLPs; every parameter is left to ``to_json``."""
    lines = str(layout).splitlines()
    assert lines[0].startswith(f"{layout.model_type}: 2 attention layers, ")
    assert 2 <= len(lines) <= 8
    assert any("heads on" in line and "blocks Q K V O" in line for line in lines)
    assert repr(layout).startswith("<ModelLayout of ")
    assert len(repr(layout).splitlines()) == 1
    assert max(map(len, [*lines, repr(layout)])) < 160
    assert layout.parameters[0].name not in str(layout)


def test_a_shared_module_is_told_and_kept(layout):
    """How often it runs is in the words, is known of its parameters, and survives JSON; layouts without any
    have the JSON they had."""
    path = layout.attention[0].module
    shared = replace(layout, shared=(SharedModule(path, 12),))
    assert f"{path} runs 12 times in a forward pass" in str(shared)
    inside = layout.attention[0].block("Q").weight.parameter
    assert (shared.runs(inside), shared.runs(path), shared.runs(path + "x")) == (12, 12, 1)
    assert ModelLayout.from_json(shared.to_json()) == shared
    assert "shared" not in layout.to_json()
    many = replace(layout, shared=tuple(SharedModule(f"m{i}", 2) for i in range(9)))
    assert "6 more like that" in str(many)


@pytest.mark.parametrize("wrong", [{"module": "m", "runs": 1}, {"module": 3, "runs": 2}, {"runs": 2}, "m", 7])
def test_what_cannot_be_shared_is_no_layout(layout, wrong):
    """A stranger's JSON is refused like any other that is not a layout."""
    with pytest.raises(ValueError, match=r"not a model layout|no module that runs several times"):
        ModelLayout.from_json(layout.to_json() | {"shared": [wrong]})
