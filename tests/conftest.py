"""One thread for tiny models (several fight over the cores), no network, and the repository's root on the path."""

import os
import sys
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))


import pytest  # noqa: E402  # after the environment is set
from runs import make_files  # noqa: E402


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Folder with the tiny `model`, `images` and `reward.py`."""
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder
