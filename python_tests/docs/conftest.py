"""What the tests of the documents share: a folder to work in, and a small model in SmolLM2's place."""

import pytest
from documents import ROOT, demo_cache


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory):
    return demo_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def desk(tmp_path, monkeypatch, small_cache):
    """An empty folder with the repository's examples, in which `smollm2` is a small random model."""
    monkeypatch.setenv("ENGRAM_CACHE", str(small_cache))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path
