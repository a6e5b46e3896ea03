"""What tests of several files are given."""

import logging
import os
import random
import re

import numpy as np
import pytest
import torch


def pytest_configure(config):
    """Hides GPUs from all tests but those marked gpu, and from the scripts that they start."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Else a driver that is too old is a line more on stderr.
    own = ["ignore:CUDA initialization:UserWarning", os.environ.get("PYTHONWARNINGS")]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, own))


@pytest.fixture(autouse=True)
def seeded():
    """The random numbers of a test do not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def said(monkeypatch, caplog):
    """caplog, with the lines of a run's log, which leaves them to nobody else."""
    monkeypatch.setattr(logging.getLogger("pc-darts"), "propagate", True)
    with caplog.at_level(logging.INFO, "pc-darts"):
        yield caplog
