"""The server's binary, a fixture of all suites in Python here: `pytest_plugins` in their conftest.py."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def binary(tmp_path_factory):
    """A copy of the server's binary, since a build may replace it meanwhile."""
    given = os.environ.get("SD_SERVER")
    if not given or not Path(given).is_file():
        pytest.fail("SD_SERVER must name the sd-server binary", pytrace=False)
    return shutil.copy(given, tmp_path_factory.mktemp("bin") / "sd-server")
