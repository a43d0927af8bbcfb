"""A real collection of a GPT-2 of one layer: two tasks, a segment for every batch, a snapshot after each."""

from unittest.mock import patch

import fisherscope as fs
from fisherscope.instrument import collection
from tests import models

SETTING = next(setting for setting in models.SETTINGS if setting.name == "gpt2")
TASKS = {"math": models.rows(6), "code": models.rows(5, seed=5)}


def wrapped():
    """The model, instrumented; its layout is checked elsewhere."""
    return fs.wrap(models.build(SETTING, layers=1), verify=False)


def collect(scope, root, **options):
    """Collect into ``root``, or go on with it; committed after every batch, snapshots as often as that."""
    often = {"SEGMENT_BYTES": 1, "SNAPSHOT_SHARE": 1e9}
    with patch.multiple(collection, **often):
        return scope.collect(TASKS, root, batch_size=2, quiet=True, **options)
