"""Settings that every test shares: no network, no progress bars, seeded randomness, one thread."""

import gc
import os
import random

# Before anything imports torch, transformers or datasets, which read these once. Processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("fisherscope", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fisherscope")


def pytest_configure():
    """One thread, however many cores there are: rounding, and so the tests, do not depend on the machine.

    The models are tiny, so that a second thread costs more than it does.
    """
    torch.set_num_threads(1)


def pytest_collection_finish():
    """Libraries and tests are there to stay: looking for garbage among them again and again takes a while."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same random state, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
