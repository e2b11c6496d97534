"""The export format "web": its page in real Chromium, served as plain files, and compared with the server's page."""

import base64
import http.server
import io
import json
import os
import re
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from browsing import CLASSES, FAR, PHONE, SHADES, check_phone, choose, colours, heat, pixels, rows, skip
from conftest import TURNED, encoded, exif, succeed
from PIL import Image

from sepvit_lib.inference.attention import record_attention, rollout
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.inference.images import read_image
from tools import export
from tools.exporting import web, writers
from tools.exporting.data import photographs as sample_photographs
from tools.page.predictors import ClassifierPredictor, read_upload

SHARE = 1e-3  # largest difference of probabilities and of attention weights

# ----------------------------------------------------------------------------------------------------------------------
# Export and server
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(four_classes, tmp_path_factory) -> Path:
    """The classifier, less sure of itself: a photograph's class gets a logit of 1.8, the others 0."""
    content = torch.load(four_classes, weights_only=True)
    content["model"]["head.weight"] *= 0.2
    path = tmp_path_factory.mktemp("unsure") / "four.pth"
    torch.save(content, path)
    return path


def require_npm() -> None:
    if shutil.which("npm") is None:
        skip("needs npm: apt-get install npm (Debian), or any package of Node.js")


def export_page(checkpoint: Path, out: Path) -> SimpleNamespace:
    """Export a checkpoint's page: its folder, and what the command printed."""
    require_npm()
    arguments = ["--out", out, "--formats", "web", "--rounds", 1]
    printed = succeed("--resume", checkpoint, *arguments, script="tools/export.py")
    return SimpleNamespace(folder=next(out.glob("*-web")), printed=printed)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export_page(checkpoint, tmp_path_factory.mktemp("exported") / "out")


class Handler(http.server.SimpleHTTPRequestHandler):
    """That of `python -m http.server`, without its messages."""

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(folder: Path):
    """Serve the files of a folder; yields the page's URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def url(exported):
    with serving(exported.folder) as url:
        yield url


def varied(exported: SimpleNamespace, folder: Path, name: str, content: bytes) -> Path:
    """Make a folder like the exported one, with a different file."""
    folder.mkdir()
    for path in exported.folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def page(open_page, url):
    return open_page(url)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    """What the server's page predicts with."""
    return ClassifierPredictor(load_classifier(str(checkpoint)))


def answer(page, content: bytes) -> dict:
    """What the page computes for an image file: rows, note, and the weights of each block as an array."""
    found = page.evaluate(
        """async (text) => {
            const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
            const { predict } = await import(new URL("predictor.js", location.href));
            const { rows, blocks, note } = await predict(new File([bytes], "image"), new AbortController().signal);
            return { rows, note, blocks: blocks.map((block) => [block.label, [...block.weights]]) };
        }""",
        base64.b64encode(content).decode(),
    )
    return {**found, "blocks": dict(found["blocks"])}


def assert_same(found: dict, expected, tolerance: float = SHARE) -> None:
    """Require the server's answer: rows, and the weights of all blocks and of the rollout."""
    assert found["rows"][0]["name"] == expected.rows[0].name
    shares = {row["name"]: row["share"] for row in found["rows"]}
    assert shares == pytest.approx({row.name: row.share for row in expected.rows}, abs=tolerance)
    assert list(found["blocks"]) == [block.label for block in expected.blocks]
    for block in expected.blocks:
        assert np.allclose(found["blocks"][block.label], block.weights.ravel(), atol=tolerance)
    assert found["note"] == expected.note


# ----------------------------------------------------------------------------------------------------------------------
# Export
# ----------------------------------------------------------------------------------------------------------------------


def test_the_folder_has_a_row_in_the_table(exported):
    (row,) = (line for line in exported.printed.splitlines() if line.startswith("| web "))
    assert float(row.split("|")[4]) < writers.MAX_DIFFERENCE
    names = {path.relative_to(exported.folder).as_posix() for path in exported.folder.rglob("*")}
    assert {"index.html", "predictor.js", "worker.js", "about.json", web.NETWORK, *web.RUNTIME_FILES} <= names


def test_the_format_is_not_a_default():
    args = export.build_parser().parse_args(["--resume", "x", "--out", "y"])
    assert "web" not in export.choose_formats(args)[0]


DOWNLOADS = {
    "onnxruntime-web@0.0.0": r"npm cannot download onnxruntime-web@0\.0\.0 \(.+\)",
    "onnxruntime-common@1.26.0": r"npm's onnxruntime-common@1\.26\.0 is not the expected package",
}


@pytest.mark.parametrize("package", DOWNLOADS)
def test_downloads_that_fail(package, tmp_path, monkeypatch):
    require_npm()
    monkeypatch.setattr(web, "RUNTIME", package)
    with pytest.raises(RuntimeError, match=DOWNLOADS[package]):
        web.fetch_runtime(tmp_path, tmp_path)


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs npm, .*Node\.js"):
        web.fetch_runtime(tmp_path, tmp_path)


def test_inputs_that_are_not_square_are_refused(tmp_path):
    path = tmp_path / "wide.pth"
    network = timm.create_model("test_resnet", num_classes=2)
    settings = dict(model="test_resnet", input_size=(32, 64))
    torch.save({"model": network.state_dict(), "classes": ["a", "b"], "args": settings}, path)
    job = writers.Job(load_classifier(str(path)), tmp_path, samples=sample_photographs(3).images)
    with pytest.raises(ValueError, match="only RGB, square inputs and a centre crop"):
        web.write_web(job, tmp_path / "page")
    assert not (tmp_path / "page").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Prediction
# ----------------------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_predict(page, photographs, checkpoint):
    predicted = json.loads(succeed(*photographs.values(), "--resume", checkpoint, "--json", "-", script="predict.py"))
    for name, (path, expected) in zip(photographs, zip(photographs.values(), predicted, strict=True)):
        choose(page, path)
        page.locator("#rows .name").first.filter(has_text=name).wait_for()
        found = {row["name"]: row["share"] for row in answer(page, path.read_bytes())["rows"]}
        wanted = {row["class"]: row["probability"] for row in expected["predictions"]}
        assert max(wanted, key=wanted.get) == name
        assert found == pytest.approx({name: wanted[name] for name in found}, abs=SHARE)
        assert rows(page)[0] == (name, f"{100 * wanted[name]:.1f} %")
    assert page.locator("#live").inner_text().startswith("Prediction: astronaut, ")


def files(cat: Image.Image) -> dict[str, bytes]:
    """A photograph as files of several kinds."""
    transparent = cat.convert("RGBA")
    transparent.putalpha(Image.new("L", cat.size, 255))
    transparent.paste((9, 9, 9, 0), (0, 0, 200, 200))
    return {
        "png": encoded(cat, "PNG"),
        "transparent": encoded(transparent, "PNG"),
        "palette": encoded(cat.quantize(64), "PNG"),
        "grey": encoded(cat.convert("L"), "PNG"),
        "webp": encoded(cat, "WEBP", lossless=True),
        "long": encoded(cat.resize((3000, 60)), "PNG"),
        "large": encoded(cat.resize((3001, 2000)), "PNG"),
        "small": encoded(cat.resize((9, 8)), "PNG"),
        "jpeg": encoded(cat, "JPEG", quality=90),
    }


def test_answers_equal_the_servers(page, photographs, predictor):
    """For images that are transparent, long, larger than a strip of the decoder, or smaller than the input."""
    for kind, content in files(read_image(photographs["cat"], "image")).items():
        expected = predictor.predict(read_upload(content, predictor.orientation))
        assert_same(answer(page, content), expected, SHARE if kind != "jpeg" else 10 * SHARE)


@pytest.mark.parametrize("orientation", ["exif", "stored"])
def test_orientation(orientation, open_page, exported, photographs, predictor, tmp_path):
    """Images are turned upright if those of the training were."""
    about = json.loads((exported.folder / "about.json").read_text())
    content = json.dumps({**about, "orientation": orientation}).encode()
    folder = varied(exported, tmp_path / "page", "about.json", content)
    image = encoded(read_image(photographs["cat"], "image"), "JPEG", exif=exif(TURNED), quality=95)
    with serving(folder) as url:
        found = answer(open_page(url), image)
    upright, stored = (predictor.predict(read_upload(image, one)) for one in ("exif", "stored"))
    expected, other = (upright, stored) if orientation == "exif" else (stored, upright)
    assert_same(found, expected, 10 * SHARE)
    assert not np.allclose(found["blocks"]["0.0"], other.blocks[0].weights.ravel(), atol=10 * SHARE)


def test_heat_map(page, photographs, checkpoint):
    """The picture is what the network sees; the colours are the recorded weights of the outlined window."""
    choose(page, photographs["cat"])
    classifier, image = load_classifier(str(checkpoint)), read_image(photographs["cat"], "image")
    crop = np.asarray(classifier.description.preprocessing.crop(image)).astype(int)
    difference = abs(pixels(page, "picture")[..., :3] - crop)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    recorded = record_attention(classifier.network, classifier.prepare(image)[None])
    first, total = recorded[0], rollout(recorded)
    for label, weights in (("0.0", first.among_mean()[0]), ("rollout", total.weights[0])):
        page.locator(f"#blocks input[value='{label}']").check()
        row, column = map(int, re.findall(r"\d+", page.locator("#reading").inner_text())[:2])
        expected = colours(weights, row * first.grid[1] + column, first.grid)
        assert abs(heat(page, first.grid, first.stride) - expected).max() <= SHADES


def test_networks_without_attention_and_with_several_labels(open_page, photographs, tmp_path):
    network = timm.create_model("test_resnet", num_classes=len(CLASSES)).eval()
    settings = dict(model="test_resnet", input_size=96, multi_label=True)
    torch.save({"model": network.state_dict(), "classes": CLASSES, "args": settings}, tmp_path / "several.pth")
    predictor = ClassifierPredictor(load_classifier(str(tmp_path / "several.pth")))
    folder = export_page(tmp_path / "several.pth", tmp_path / "out").folder
    expected = predictor.predict(read_image(photographs["cat"], "image"))
    assert sum(row.share for row in expected.rows) != pytest.approx(1, abs=0.1)
    with serving(folder) as url:
        page = open_page(url)
        assert_same(answer(page, photographs["cat"].read_bytes()), expected)
        choose(page, photographs["cat"])
        assert page.locator("#live").inner_text() == f"Prediction: {expected.summary}"
        assert "not a SepViT" in page.locator("#note").inner_text()
        for part in ("#heat", "#blocks", "#heads", "#hint", "#strength"):
            assert not page.locator(part).is_visible()


@pytest.mark.slow
def test_webgpu(launch, open_page, url, photographs, predictor):
    """On a GPU that Chromium simulates."""
    simulated = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    page = open_page(f"{url}?device=webgpu", launch(*simulated))
    page.locator("#facts", has_text="on WebGPU").wait_for(timeout=300_000)
    page.set_default_timeout(300_000)
    assert_same(
        answer(page, photographs["cat"].read_bytes()), predictor.predict(read_image(photographs["cat"], "image"))
    )


# ----------------------------------------------------------------------------------------------------------------------
# Browser
# ----------------------------------------------------------------------------------------------------------------------


def test_threads(page, open_page, url, photographs):
    """They need a page isolated from other origins, which is not possible without encryption on another machine."""
    page.locator("#facts", has_text="on WebAssembly").wait_for()
    assert page.evaluate("crossOriginIsolated")
    count = min(page.evaluate("navigator.hardwareConcurrency"), 4)
    assert page.locator("#facts").inner_text().endswith(f"on WebAssembly, {count} thread{'s' if count > 1 else ''}")

    far = open_page(url.replace("127.0.0.1", FAR))
    far.locator("#facts", has_text="on WebAssembly, 1 thread").wait_for()
    assert not far.evaluate("crossOriginIsolated")
    choose(far, photographs["rocket"])
    assert rows(far)[0][0] == "rocket"


def test_without_a_network_connection(open_page, exported, photographs):
    """Once loaded, the page predicts further images, and can even be loaded again."""
    with serving(exported.folder) as url:
        page = open_page(url)
        page.locator("#facts", has_text="on WebAssembly").wait_for()
    page.context.set_offline(True)
    choose(page, photographs["coffee"])
    assert rows(page)[0][0] == "coffee"
    page.reload()
    choose(page, photographs["rocket"])
    assert rows(page)[0][0] == "rocket"


def test_a_newer_export_is_shown(open_page, exported, tmp_path):
    """Files that a browser has kept are used only without a connection."""
    about = (exported.folder / "about.json").read_bytes()
    folder = varied(exported, tmp_path / "page", "about.json", about)
    os.utime(folder / "about.json", (0, 0))  # the server compares modification times in whole seconds
    with serving(folder) as url:
        page = open_page(url)
        page.locator("#facts", has_text="4 classes").wait_for()
        (folder / "about.json").write_bytes(about.replace(b'"classes": "4"', b'"classes": "5"'))
        page.reload()
        page.locator("#facts", has_text="5 classes").wait_for()


def test_phone(open_page, url, photographs):
    page = open_page(url, **PHONE)
    page.locator("#facts", has_text="on WebAssembly").wait_for()
    check_phone(page, photographs["coffee"])


def test_samples(page):
    page.locator("#samples button[title='a rocket']").click()
    page.wait_for_selector("#rows li")
    assert rows(page)[0][0] == "rocket"


def test_images_that_are_refused(page, photographs):
    many = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(many, "PNG")
    choose(page, photographs["cat"])
    for content, expected in (
        (b"nothing", "bad.png: This is not an image that the browser can read, or it is damaged."),
        (many.getvalue(), "bad.png: The image has 100 megapixels, more than 50. Make it smaller."),
    ):
        page.locator("#file").set_input_files(dict(name="bad.png", mimeType="image/png", buffer=content))
        page.locator("#error", has_text=expected).wait_for()
        assert rows(page)[0][0] == "cat"
    choose(page, photographs["rocket"])
    page.locator("#rows .name").first.filter(has_text="rocket").wait_for()
    assert not page.locator("#error").is_visible()


def test_an_image_that_has_been_replaced_is_not_reported(page, photographs):
    """Its error arrives after the next image was chosen."""
    page.evaluate(
        """() => {
            const decode = createImageBitmap;
            window.isDecoding = new Promise((decoding) => {
                const isReplaced = new Promise((resolve) => { window.replaced = resolve; });
                window.createImageBitmap = async () => {
                    window.createImageBitmap = decode;
                    decoding();
                    await isReplaced;
                    throw new Error();
                };
            });
        }"""
    )
    page.locator("#file").set_input_files(photographs["cat"])
    page.evaluate("isDecoding")
    page.locator("#file").set_input_files(photographs["rocket"])
    page.evaluate("replaced()")
    page.locator("#rows .name").first.filter(has_text="rocket").wait_for()
    assert not page.locator("#error").is_visible()
    assert not page.locator("#busy").is_visible()


def test_a_damaged_network_is_reported(open_page, exported, tmp_path):
    with serving(varied(exported, tmp_path / "page", web.NETWORK, b"damaged")) as url:
        page = open_page(url)
        page.locator("#error", has_text="The network could not be loaded").wait_for()
        assert page.locator("#facts").inner_text() == "4 classes · input 224 × 224"
