"""Fixtures: servers around the binary, and a browser."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from browser import FLAGS
from server import serving

pytest_plugins = ["server_binary"]


@pytest.fixture(scope="session")
def server(binary, tmp_path_factory):
    """A server that asks for no key."""
    with serving(binary, tmp_path_factory.mktemp("log") / "open.log") as url:
        yield url


@pytest.fixture(scope="session")
def furnished(binary, tmp_path_factory):
    """A server that has LoRAs."""
    loras = Path(__file__).parents[2] / "models" / "demo" / "loras"
    log = tmp_path_factory.mktemp("log") / "furnished.log"
    with serving(binary, log, "--loras-dir", str(loras)) as url:
        yield url


@pytest.fixture(scope="session")
def steered(binary, tmp_path_factory):
    """A server that has ControlNets, with a small random model that they fit, and an upscaler of a known name."""
    fixtures = Path(__file__).parents[2] / "models" / "tests" / "fixtures"
    model, upscalers = tmp_path_factory.mktemp("v1"), tmp_path_factory.mktemp("upscalers")
    shutil.copytree(fixtures / "v1", model, dirs_exist_ok=True)
    shutil.rmtree(model / "unet")
    shutil.copytree(fixtures / "control" / "v1", model, dirs_exist_ok=True)
    shutil.copy(fixtures / "upscalers" / "old-4x.pth", upscalers / "RealESRGAN_x4plus.pth")
    folders = ["--controlnets-dir", str(fixtures / "control" / "nets"), "--upscalers-dir", str(upscalers)]
    log = tmp_path_factory.mktemp("log") / "steered.log"
    with serving(binary, log, *folders, model=("--model", str(model))) as url:
        yield url


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests; each test has its own profile."""
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def locked(binary, tmp_path_factory):
    """A server whose key is `sesame`."""
    with serving(binary, tmp_path_factory.mktemp("log") / "locked.log", "--api-key", "sesame") as url:
        yield url
