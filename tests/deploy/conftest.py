"""Fixtures: processes; the server's binary and an AWS account of moto's are plugins."""

import os
from pathlib import Path

import pytest

from processes import Processes

pytest_plugins = ["server_binary", "moto_account"]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def pytest_runtest_setup(item):
    """Long drills run only where they are asked for."""
    if item.get_closest_marker("drill") and not os.environ.get("DRILLS"):
        pytest.skip("a drill: DRILLS=1 runs it")


@pytest.fixture
def processes(tmp_path):
    """Processes that end with the test."""
    with Processes(tmp_path) as running:
        yield running
