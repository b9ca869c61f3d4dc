"""The live page in a real browser: a person switches two sensors off and sees what happens."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live import tiny_run
from support.media_files import write_video
from support.patience import PATIENCE_S

pytestmark = pytest.mark.extra
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

WAIT_MS = 1000 * PATIENCE_S


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return that of the page of a video that plays for longer than the test lasts."""
    root = tmp_path_factory.mktemp("page")
    tiny_run(root / "run")
    write_video(root / "video.mp4", seconds=600, fps=5, pan_px_s=10, size=(320, 240))
    words = ["live", "run", "--source", "video.mp4", "--browser", "--hop", "0.25"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-u", "-m", "karmma_pipeline.cli", *words]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        first = next(line for line in process.stdout if line.startswith("open "))
        yield first.split()[1]
        process.send_signal(signal.SIGINT)
        process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1300, 400])
def test_sensors_that_a_person_switches_off_are_absent(
    address: str, browser: Any, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: faults.extend([] if address in request.url else [request.url])
    )
    page.goto(address)
    page.wait_for_selector("#of-rgb.seen", timeout=WAIT_MS)
    page.wait_for_selector("#of-audio.seen", timeout=WAIT_MS)
    for modality in ("flow", "audio"):
        page.click(f"#of-{modality}")
    for modality in ("flow", "audio"):
        off = f"#of-{modality}[aria-pressed=false]:not(.seen):not(.lost)"
        page.wait_for_selector(f"{off} small:text-is('off')", timeout=WAIT_MS)
    page.wait_for_selector("#of-rgb.seen", timeout=WAIT_MS)
    page.wait_for_selector(".bar", timeout=WAIT_MS)
    lights = "#timeline div:last-child i"
    page.wait_for_function(
        f"[...document.querySelectorAll('{lights}')].map(i => i.className).join() === 'seen,,'",
        timeout=WAIT_MS,
    )
    page.wait_for_function(
        "document.getElementById('picture').naturalWidth === 320", timeout=WAIT_MS
    )
    assert "predicted" in page.inner_text("#state")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("KARMMA_PICTURES"):  # to look at
        page.screenshot(path=Path(folder) / f"live_{width}.png")
    for modality in ("flow", "audio"):
        page.click(f"#of-{modality}")
        page.wait_for_selector(f"#of-{modality}.seen", timeout=WAIT_MS)
    assert not faults
    page.close()
