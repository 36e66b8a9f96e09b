"""What many tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the caches of datasets out of the user's."""
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture
def real_data() -> Path:
    """The folder of real data; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("REMANENCE_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"the real data is not at {folder} (set REMANENCE_DATA)")
    return folder.resolve()
