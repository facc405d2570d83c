"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local_llava.types import ModelFiles


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
