"""What tests of several files are given."""

import logging
import random

import numpy as np
import pytest
import torch


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
