"""The running page that tests in a browser and tests over HTTP speak to, one for each module of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_server import Server


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tiny_model, tmp_path_factory.mktemp("page"))
    yield started
    assert started.end() == 130
    assert not list(started.clips.glob("**/.*"))  # nothing half-written
    assert not (started.clips / "served").exists()
