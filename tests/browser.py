"""A headless browser without a network, for tests of the page."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Path of a Chromium; Debian's is installed where it is missing and this is root."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=600)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium here, and this is not root on a Debian to install it")
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that finds no host but this computer, and whose camera shows a moving test picture."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium(),
            args=[
                "--no-sandbox",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
            ],
        )
        try:
            yield launched
        finally:
            launched.close()
