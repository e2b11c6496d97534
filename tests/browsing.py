"""Pages in real Chromium, for the tests of tools/app.py and of the export format "web"."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("cat", "coffee", "rocket", "astronaut")
PHOTOGRAPHS = dict(zip(CLASSES, ("chelsea", "coffee", "rocket", "astronaut")))
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = dict(viewport=dict(width=375, height=667), has_touch=True, is_mobile=True)
FAR = "far.test"  # a host name of this machine that browsers do not trust as they trust localhost
SHADES = 8  # of 255: the page's colour map has 17 steps, matplotlib's 256

# ----------------------------------------------------------------------------------------------------------------------
# Classifier
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> dict[str, Path]:
    """A photograph of each class, as a file."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    paths = {name: folder / f"{name} & <b>.png" for name in CLASSES}
    for name, path in paths.items():
        Image.fromarray(getattr(data, PHOTOGRAPHS[name])()).save(path)
    return paths


@pytest.fixture(scope="module")
def four_classes(photographs, tmp_path_factory) -> Path:
    """A checkpoint of SepViT_Lite that gives each photograph a logit of 9 for its class, and of 0 for the others.

    It has pseudo-random weights, and a last layer that is solved for.
    """
    from conftest import golden_shapes, golden_weights

    from sepvit_lib.inference.classifier import load_classifier

    path = tmp_path_factory.mktemp("classifier") / "four.pth"
    weights = golden_weights(golden_shapes("SepViT_Lite"))
    weights["head.weight"], weights["head.bias"] = torch.zeros(len(CLASSES), 256), torch.zeros(len(CLASSES))
    torch.save({"model": weights, "classes": CLASSES}, path)
    classifier = load_classifier(str(path))
    inputs = torch.stack(classifier.inputs(list(photographs.values())))
    network: Any = classifier.network
    with torch.no_grad():
        features = network.forward_head(network.forward_features(inputs), pre_logits=True)
    weights["head.weight"] = (torch.linalg.pinv(features.double()) @ (9 * torch.eye(len(CLASSES)).double())).T.float()
    torch.save({"model": weights, "classes": CLASSES}, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Browser
# ----------------------------------------------------------------------------------------------------------------------


def skip(reason: str) -> None:
    """Skip a test that lacks a program; on CI, where nothing may be lacking, let it fail."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def launch() -> Iterator[Any]:
    """A function that launches Chromium, as the system installed it, with additional switches."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        skip("needs Chromium: apt-get install chromium (Debian), or any package with a command chromium")
    from playwright.sync_api import sync_playwright

    browsers = []

    def launch(*switches: str):
        options = ["--no-sandbox", "--disable-dev-shm-usage", f"--host-resolver-rules=MAP {FAR} 127.0.0.1", *switches]
        browsers.append(playwright.chromium.launch(executable_path=found, args=options))
        return browsers[-1]

    with sync_playwright() as playwright:
        yield launch
        for browser in browsers:
            browser.close()


@pytest.fixture(scope="module")
def browser(launch):
    """Chromium without a GPU."""
    return launch("--disable-gpu")


@pytest.fixture
def open_page(browser):
    """A function that opens a server's page. At the end, no request may have gone elsewhere, and no script failed."""
    contexts, origins, requests, errors = [], set(), [], []

    def open_page(url: str, browser=browser, **options):
        context = browser.new_context(**{"viewport": dict(width=1200, height=900), **options})
        contexts.append(context)
        origins.add(origin_of(url))
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#samples img")
        return page

    yield open_page
    assert set(map(origin_of, requests)) == origins
    assert errors == []
    for context in contexts:
        context.close()


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL."""
    return "{0.scheme}://{0.netloc}".format(urlsplit(url))


# ----------------------------------------------------------------------------------------------------------------------
# Page
# ----------------------------------------------------------------------------------------------------------------------


def choose(page, path: Path) -> None:
    """Choose a file, and wait for its prediction."""
    page.locator("#file").set_input_files(path)
    page.wait_for_selector("#rows li")
    page.wait_for_selector("#busy", state="hidden")


def check_phone(page, path: Path) -> None:
    """Require that a page as wide as a phone does not scroll sideways, and that windows of a picture can be tapped."""
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    choose(page, path)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#stage").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 5, box["y"] + 5)
    assert "row 0, column 7 of 8 × 8" in page.locator("#reading").inner_text()
    page.touchscreen.tap(box["x"] + 5, box["y"] + 5)
    assert "row 0, column 0 of 8 × 8" in page.locator("#reading").inner_text()


def rows(page) -> list[tuple[str, str]]:
    """The lines of the prediction: class and percentage."""
    return list(zip(*(page.locator(f"#rows li {part}").all_inner_texts() for part in (".name", ".share"))))


def pixels(page, canvas: str) -> np.ndarray:
    """The pixels of a canvas, H × W × 4."""
    text = page.evaluate("(id) => document.getElementById(id).toDataURL('image/png')", canvas)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGBA"))


def heat(page, grid: tuple[int, int], side: int) -> np.ndarray:
    """The heat map's colours in the middle of each window, rows × columns × 3."""
    shown = pixels(page, "heat")
    rows, columns = ([int(min((i + 0.5) * side, 223) / 224 * n) for i in range(k)] for k, n in zip(grid, shown.shape))
    return shown[rows][:, columns, :3]


def colours(weights: torch.Tensor, window: int, grid: tuple[int, int]) -> np.ndarray:
    """The colours that a window's weights should have, rows × columns × 3.

    Args:
        weights: n × n.
        window: the chosen window's number.
        grid: rows and columns of windows.
    """
    import matplotlib

    shares = (weights[window] / max(weights.max().item(), 2 / len(weights))).reshape(grid).numpy()
    return (255 * matplotlib.colormaps["inferno"](shares)[..., :3]).round().astype(int)
