from pathlib import Path
from typing import Any

import pytest
from support.media_files import Maker, write_video


@pytest.fixture
def make_video(tmp_path: Path) -> Maker:
    def make(name: str = "v.mp4", **options: Any) -> Path:
        return write_video(tmp_path / name, **options)

    return make
