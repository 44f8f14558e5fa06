# Copyright 2026 The img2img-ddpo authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""One thread for tiny models (several fight over the cores), no network, and the repository's root on the path."""

import os
import sys
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))


import pytest  # noqa: E402  # after the environment is set


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Folder with the tiny `model`, `images` and `reward.py`."""
    from runs import make_files

    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture(scope="session")
def hub():
    """A stand-in for the Hub."""
    from hub_stand_in import Hub

    return Hub()


@pytest.fixture(scope="session")
def warm(hub):
    """Starts runs without waiting for imports; their Hub is the stand-in."""
    from runs import Warm

    warm = Warm(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    yield warm
    warm.close()
