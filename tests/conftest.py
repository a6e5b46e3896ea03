"""What tests of several files are given."""

import logging

import pytest


@pytest.fixture
def said(monkeypatch, caplog):
    """caplog, with the lines of a run's log, which leaves them to nobody else."""
    monkeypatch.setattr(logging.getLogger("pc-darts"), "propagate", True)
    with caplog.at_level(logging.INFO, "pc-darts"):
        yield caplog
