"""Settings for all tests, and pictures of pages."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, what the tests start would never end by it

WIDTHS = {1280: 900, 390: 800}  # a laptop and a phone: width and height, px


@pytest.fixture(scope="session")
def shoot(tmp_path_factory):
    "Take a page's pictures, as a laptop and a phone show it; they stay where SEGPC_SCREENSHOTS says."
    from segpc_nb.images import read_picture

    folder = Path(os.environ.get("SEGPC_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def take(page, name):
        for width, height in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")
            path = folder / f"{name}_{width}.png"
            page.screenshot(path=path, animations="disabled")
            picture = read_picture(path)
            assert picture.shape[:2] == (height, width)
            assert len(set(map(tuple, picture[::7, ::7].reshape(-1, 3).tolist()))) > 20, f"{path} is nearly empty"
        page.set_viewport_size({"width": 1280, "height": 900})

    return take
