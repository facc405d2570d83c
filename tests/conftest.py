"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from local_llava.types import ModelFiles

if TYPE_CHECKING:
    from page_actions import Server
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session", autouse=True)
def _no_pictures_in_the_home_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands keep what they computed of pictures; those of the tests do so in a directory of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_LLAVA_CACHE", str(tmp_path_factory.mktemp("pictures")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The built-in model, with nothing rounded."""
    from local_llava.convert import convert

    checkpoint = Path(__file__).parent.parent / "models" / "tiny-llava"
    return convert(checkpoint, tmp_path_factory.mktemp("tiny"), quant="F32", mmproj_quant="F32")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, for this process and for the command."""
    home = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless browser without a network."""
    from browser import browser

    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page's, with a model that writes what the question says."""
    from page_actions import scripted_server

    with scripted_server(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Page]:
    """The page in a fresh browser profile."""
    from page_actions import opened

    yield from opened(chromium, server.url)
