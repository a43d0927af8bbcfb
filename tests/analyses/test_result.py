"""Results: strict JSON and HTML."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fisherscope.analyses import Result
from fisherscope.analyses.result import strict


@dataclass(kw_only=True, eq=False, repr=False)
class Plain(Result):
    def top(self, k=10):
        return self.frame.head(k)

    def summary(self):
        return "first <line>\nsecond"


def make(**changes):
    frame = pd.DataFrame({"name": ["<b>", "c"], "value": [1.5, np.nan], "flag": [True, False]})
    return Plain(**({"name": "plain", "config": {"a": (1, 2)}, "frame": frame} | changes))


def test_json_is_strict():
    """NaN and infinities become null, numpy and pandas values plain ones, at any depth."""
    values = {"a": np.float32("nan"), "b": [np.inf, np.int64(3)], 4: (Path("x"), np.bool_(True), pd.NA)}
    assert strict(values) == {"a": None, "b": [None, 3], "4": ["x", True, None]}
    data = json.loads(json.dumps(make().to_json(), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["config"] == {"a": [1, 2]}
    assert data["tables"]["plain"] == {
        "columns": ["name", "value", "flag"],
        "rows": [["<b>", 1.5, True], ["c", None, False]],
        "total": 2,
    }


def test_json_refuses_what_it_does_not_know():
    """A value without a JSON form is an error, not a string by accident."""
    with pytest.raises(TypeError, match="object"):
        strict({"a": object()})


def test_long_tables_are_cut_in_json_and_say_so():
    """A cut table tells how many rows there are."""
    table = make().to_json(max_rows=1)["tables"]["plain"]
    assert (len(table["rows"]), table["total"]) == (1, 2)


def test_further_tables_are_named_after_the_analysis():
    """Every table has a name of its own, fit for a file."""
    result = make(extra={"more": pd.DataFrame({"x": [1]})})
    assert list(result.tables()) == ["plain", "plain_more"]


def test_html_is_escaped():
    """Text from samples or names cannot inject markup."""
    html = make(warnings=["<script>"])._repr_html_()
    assert "<script>" not in html
    assert "<b>c" not in html
    assert "first &lt;line&gt;" in html
