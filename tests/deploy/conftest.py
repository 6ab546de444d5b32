"""Fixtures: the server's binary, an AWS account of moto's, processes."""

import os
import shutil
from pathlib import Path

import pytest

import moto_account
from processes import Processes

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def pytest_runtest_setup(item):
    """Long drills run only where they are asked for."""
    if item.get_closest_marker("drill") and not os.environ.get("DRILLS"):
        pytest.skip("a drill: DRILLS=1 runs it")


@pytest.fixture(scope="session")
def binary(tmp_path_factory):
    """A copy of the server's binary, since a build may replace it meanwhile."""
    given = os.environ.get("SD_SERVER")
    if not given or not Path(given).is_file():
        pytest.fail("SD_SERVER must name the sd-server binary", pytrace=False)
    return shutil.copy(given, tmp_path_factory.mktemp("bin") / "sd-server")


@pytest.fixture
def processes(tmp_path):
    """Processes that end with the test."""
    with Processes(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def aws():
    """The address of an AWS account that is empty at the beginning of each module."""
    with moto_account.opened() as url:
        yield url
