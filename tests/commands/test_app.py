"""The page of tools/app.py in real Chromium, its server, and users' mistakes."""

import argparse
import base64
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import anyio
import numpy as np
import pytest
import torch
from browsing import CLASSES, PHONE, SHADES, check_phone, choose, colours, heat, pixels, rows
from conftest import ROOT, refusal
from PIL import Image
from processes import Command

from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.attention import record_attention, rollout
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.inference.exported import DESCRIPTION
from sepvit_lib.inference.images import read_image
from tools import app
from tools.page.predictors import ClassifierPredictor
from tools.page.samples import load_samples
from tools.page.server import MAX_BYTES, read_body

SEGMENTATION = "segmentation/configs/fpn_sepvit_lite_112x112_demo.py"
DETECTION = "detection/configs/mask_rcnn_sepvit_lite_fpn_demo.py"

# ----------------------------------------------------------------------------------------------------------------------
# Server
# ----------------------------------------------------------------------------------------------------------------------


class Server:
    """tools/app.py as a command, on a free port. Once it listens, it cannot write to any file.

    Args:
        folder: its working folder, which is its folder for temporary files too. Stays empty.
        *arguments: of the command.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder / "temporary"
        self.folder.mkdir()
        self.printed = folder / "stdout", folder / "stderr"
        environment = {**os.environ, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        arguments = (*map(str, arguments), "--port", "0")
        self.command = Command(ROOT / "tools/app.py", list(arguments), self.folder, environment, *self.printed)
        while "\n" not in self.text(0).rpartition("http://")[2]:
            assert self.command.poll() is None, self.text(1)
            time.sleep(0.05)
        self.line = self.text(0).splitlines()[-1]
        self.url = self.line.partition(" ")[0]
        resource.prlimit(self.command.pid, resource.RLIMIT_FSIZE, (0, 0))

    def text(self, stream: int) -> str:
        """What it printed to standard output, 0, or standard error, 1."""
        return self.printed[stream].read_text() if self.printed[stream].exists() else ""

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict | bytes]:
        """Send a request, without a browser. Returns the status, and the content of the answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if "json" in answer.headers["content-type"] else content

    def stop(self) -> None:
        """Interrupt it as Ctrl-C does, and require that it ends well and has left no file."""
        self.command.send_signal(signal.SIGINT)
        assert self.command.wait(30) == 0, self.text(1)
        assert self.text(1) == ""
        assert list(self.folder.rglob("*")) == []


def serving(*arguments: object, factory):
    server = Server(factory.mktemp("server"), *arguments)
    try:
        yield server
        server.stop()
    finally:
        server.command.kill()


@pytest.fixture(scope="module")
def server(four_classes, tmp_path_factory):
    yield from serving("--resume", four_classes, "--device", "cpu", factory=tmp_path_factory)


@pytest.fixture
def page(open_page, server):
    return open_page(server.url)


def transfer(page, path: Path):
    """The browser's object for files that are dropped or pasted, with one file in it."""
    return page.evaluate_handle(
        """([name, text]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [path.name, base64.b64encode(path.read_bytes()).decode()],
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line. These tests come first: commands that run in this process end its child processes, of which servers are
# some.
# ----------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "nothing": ("", "--resume"),
    "missing checkpoint": ("--resume none.pth", "--resume none.pth: "),
    "unknown host": ("--resume {good} --host no.such.host.invalid", "--host no.such.host.invalid"),
    "port out of range": ("--resume {good} --port 65536", "--port"),
    "device": ("--resume {good} --device foo", "--device foo"),
    "missing config": ("--resume {good} --config none.py", "CONFIG none.py: no such file"),
    "classifier for a segmentor": ("--resume {good} --config {config}", "CHECKPOINT {good}: "),
    "model of a segmentor": ("--resume {good} --config x.py --model SepViT_Lite", "--model: "),
    "averaged segmentor": ("--resume {good} --config x.py --averaged", "--averaged: "),
    "score of a classifier": ("--resume {good} --score-thr 0.5", "--score-thr 0.5: "),
    "score of a segmentor": (
        "--resume {good} --config {config} --score-thr 0.5",
        "--score-thr 0.5: only for detectors",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, four_classes, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments, expected = (part.format(good=four_classes, config=SEGMENTATION) for part in MISTAKES[mistake])
    where = "" if "--port" in arguments else "--port 0"
    assert expected in refusal(app.run, "app", f"{arguments} {where}".split(), capsys)


def test_a_taken_port(four_classes, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port {port}: " in refusal(app.run, "app", ["--resume", four_classes, "--port", port], capsys)


@pytest.mark.parametrize(
    ("module", "flags", "extra"), [("starlette", "", "tools"), ("mmdet", f"--config {SEGMENTATION}", "mm")]
)
def test_a_missing_package(module, flags, extra, four_classes, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    line = refusal(app.run, "app", ["--resume", four_classes, "--port", "0", *flags.split()], capsys)
    assert line.endswith(f"needs {module}: pip install '.[{extra}]'")


def test_addresses():
    for host, expected in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with app.listen(host, 0) as listener:
            assert app.is_loopback(listener) == expected
            port = listener.getsockname()[1]
            assert app.address_of(listener, host) == f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}"


# ----------------------------------------------------------------------------------------------------------------------
# Prediction
# ----------------------------------------------------------------------------------------------------------------------


def test_an_image_goes_in_and_its_class_comes_out(page, photographs):
    """Chosen, dropped or pasted."""
    for way, name in (("choose", "cat"), ("drop", "rocket"), ("paste", "coffee")):
        moved = transfer(page, photographs[name])
        if way == "choose":
            choose(page, photographs[name])
        elif way == "drop":
            page.dispatch_event("body", "drop", {"dataTransfer": moved})
        else:
            page.evaluate("(it) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: it}))", moved)
        page.locator("#rows .name").first.filter(has_text=name).wait_for()
        found = rows(page)
        assert found[0] == (name, "100.0 %")
        assert {row[0] for row in found} == set(CLASSES)
        assert page.locator("#live").inner_text() == f"Prediction: {name}, 100.0 %"
    assert page.locator("#times dt").all_inner_texts()[:2] == ["Preprocessing", "Network"]
    assert all(float(text.removesuffix(" ms")) >= 0 for text in page.locator("#times dd").all_inner_texts())


def test_samples(page):
    samples = page.locator("#samples button")
    titles = [samples.nth(i).get_attribute("title") for i in range(samples.count())]
    assert titles == ["a cat", "a cup of coffee", "a rocket", "an astronaut", "the digit 3"]
    samples.nth(1).click()
    page.wait_for_selector("#rows li")
    assert rows(page)[0][0] == "coffee"
    samples.nth(4).click()
    page.locator("#picture[style*='auto']").wait_for()
    assert page.locator("#error").is_hidden()


def test_digits_come_first_where_digits_are_classes(monkeypatch):
    digits = [str(digit) for digit in range(10)]
    assert list(load_samples("classifier", digits))[:2] == ["digit-3", "digit-8"]
    assert list(load_samples("segmentor", [*digits, "background"]))[:2] == ["scene-1", "scene-2"]
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert load_samples("classifier", digits) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def test_the_heat_map_follows_the_pointer(page, photographs, four_classes):
    """It shows the recorded weights of the window under the pointer, by block and head, over what the network sees."""
    choose(page, photographs["cat"])
    classifier, image = load_classifier(str(four_classes)), read_image(photographs["cat"], "image")
    crop = np.asarray(classifier.description.preprocessing.crop(image))
    assert (pixels(page, "picture")[..., :3] == crop).all()
    recorded = record_attention(classifier.network, classifier.prepare(image)[None])
    blocks = {block.name: block for block in recorded}
    several = [block.name.removeprefix("blocks.") for block in recorded if block.among is not None]
    assert page.locator("#blocks .pill").all_inner_texts() == [*several, "All"]

    box = page.locator("#stage").bounding_box()
    seen = []
    for label, name, head in (("0.0", "blocks.0.0", None), ("2.0", "blocks.2.0", None), ("2.0", "blocks.2.0", 2)):
        block = blocks[name]
        weights = block.among_mean()[0] if head is None else block.among[0, head]
        page.locator(f"#blocks input[value='{label}']").check()
        if head is not None:
            page.locator(f"#heads input[value='{head}']").check()
        for row, column in ((0, 0), (block.grid[0] - 1, 1)):
            place = [min((i + 0.5) * block.stride, 223) / 224 for i in (column, row)]
            page.mouse.move(box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"])
            window = row * block.grid[1] + column
            shown = heat(page, block.grid, block.stride)
            assert abs(shown - colours(weights, window, block.grid)).max() <= SHADES
            assert f"row {row}, column {column} of" in page.locator("#reading").inner_text()
            seen.append(shown.tobytes())
    assert len(set(seen)) == len(seen)

    page.locator("#blocks input[value='rollout']").check()
    total = rollout(recorded)
    row, column = map(int, re.findall(r"\d+", page.locator("#reading").inner_text())[:2])
    expected = colours(total.weights[0], row * total.grid[1] + column, total.grid)
    assert abs(heat(page, total.grid, total.stride) - expected).max() <= SHADES


def test_a_click_keeps_the_window(page, photographs):
    choose(page, photographs["cat"])
    stage, reading = page.locator("#stage"), page.locator("#reading")
    stage.click(position=dict(x=5, y=5))
    assert "row 0, column 0" in reading.inner_text()
    stage.hover(position=dict(x=300, y=300))
    assert "row 0, column 0" in reading.inner_text()
    stage.click(position=dict(x=300, y=300))
    stage.hover(position=dict(x=200, y=200))
    assert "row 0, column 0" not in reading.inner_text()


def test_strength(page, photographs):
    choose(page, photographs["cat"])
    page.locator("#strength").fill("0")
    assert page.locator("#heat").evaluate("it => getComputedStyle(it).opacity") == "0"
    assert page.locator("#picture").evaluate("it => getComputedStyle(it).filter") == "none"


def test_an_exported_file_has_no_attention(four_classes, photographs, page, tmp_path):
    classifier, file = load_classifier(str(four_classes)), tmp_path / "four.pt"
    traced = torch.jit.trace(classifier.network, torch.zeros(1, 3, 224, 224), check_trace=False)
    torch.jit.save(traced, str(file), _extra_files={DESCRIPTION: classifier.description.to_json()})
    answer = ClassifierPredictor(load_classifier(str(file))).predict(read_image(photographs["astronaut"], "image"))
    page.route("**/predict", lambda route: route.fulfill(json=answer.to_json()))
    choose(page, photographs["astronaut"])
    assert rows(page)[0] == ("astronaut", "100.0 %")
    assert "An exported file does not show its attention" in page.locator("#note").inner_text()
    for part in ("#heat", "#blocks", "#heads", "#hint", "#strength"):
        assert not page.locator(part).is_visible()


# ----------------------------------------------------------------------------------------------------------------------
# Keyboard, phone and dark mode
# ----------------------------------------------------------------------------------------------------------------------


def focused(page) -> str:
    """The focused control: its id or name, with a mark if nothing shows that it is focused."""
    return page.evaluate(
        """() => {
            const control = document.activeElement;
            const shown = [control, control.nextElementSibling, document.querySelector("#shown .button")];
            const visible = shown.some((it) => it && parseFloat(getComputedStyle(it).outlineWidth) >= 2
                                                  && getComputedStyle(it).outlineStyle !== "none");
            return (control.id || control.name || control.title) + (visible ? "" : " unseen");
        }"""
    )


def test_everything_works_by_keyboard(page):
    page.keyboard.press("Tab")
    assert focused(page) == "file"
    page.keyboard.press("Tab")
    assert focused(page) == "a cat"
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows li")
    page.locator("#file").focus()
    reached = []
    while "astronaut" not in (reached or [""])[-1]:
        page.keyboard.press("Tab")
        reached.append(focused(page))
        if reached[-1] == "stage":
            press_on_the_picture(page)
        if reached[-1] == "blocks":
            page.keyboard.press("ArrowRight")
            assert "of 4 × 4" in page.locator("#reading").inner_text()
        if reached[-1] == "heads":
            page.keyboard.press("ArrowRight")
            assert page.locator("#heads input:checked").get_attribute("value") == "0"
    assert reached == ["stage", "blocks", "heads", "strength", "a cat", "a cup of coffee", "a rocket", "an astronaut"]


def press_on_the_picture(page) -> None:
    """Move the window with the arrow keys, and keep it."""
    assert "row 4, column 4 of 8 × 8" in page.locator("#reading").inner_text()
    before = heat(page, (8, 8), 28).tobytes()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    reading = page.locator("#reading").inner_text()
    assert "row 2, column 5 of 8 × 8" in reading
    assert heat(page, (8, 8), 28).tobytes() != before
    page.locator("#live").filter(has_text=reading).wait_for(state="attached")
    page.keyboard.press("Enter")
    assert page.locator("#reading").inner_text() == reading + " Kept."
    page.keyboard.press("Enter")


def test_phone(open_page, server, photographs):
    check_phone(open_page(server.url, **PHONE), photographs["coffee"])


def test_a_service_worker_of_a_static_page_is_removed(open_page, server):
    """Such a page at the same address has installed it. It would go on answering for this page's server."""
    page = open_page(server.url)
    page.evaluate("navigator.serviceWorker.register('predictor.js', { type: 'module' })")
    count = "navigator.serviceWorker.getRegistrations().then((workers) => workers.length)"
    assert page.evaluate(count) == 1
    page.reload()
    for _ in range(100):
        if page.evaluate(count) == 0:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(count) == 0


def test_light_and_dark(open_page, server):
    for scheme in ("light", "dark"):
        style = open_page(server.url, color_scheme=scheme).evaluate(
            "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        behind, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in style)
        assert (behind < 0.2 and text > 0.8) if scheme == "dark" else (behind > 0.8 and text < 0.2)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------

NOT_IMAGES = {
    "broken": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "text": b"nothing",
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
}


def test_a_broken_file_is_refused(page, photographs):
    for kind, content in NOT_IMAGES.items():
        choose(page, photographs["cat"])
        page.locator("#file").set_input_files(dict(name=f"{kind}.png", mimeType="image/png", buffer=content))
        page.wait_for_selector("#error:not([hidden])")
        assert page.locator("#error").inner_text().startswith(f"{kind}.png: This is not an image, or it is damaged")
        assert rows(page)[0][0] == "cat"
    choose(page, photographs["rocket"])
    assert not page.locator("#error").is_visible()


def test_images_that_are_refused(server, photographs):
    many = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(many, "PNG")
    cut = photographs["cat"].read_bytes()[:9000]
    for content, expected in ((cut, "cannot be read"), (b"", "not an image"), (many.getvalue(), "more than 50")):
        status, answer = server.request("POST", "/predict", content)
        assert (status, expected in answer["error"]) == (422, True)


def test_a_large_file_is_refused(page, server):
    """By the page; and by the server, before the file is sent."""
    page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new ArrayBuffer(21 * 2 ** 20)], "large.png", { type: "image/png" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
        }"""
    )
    page.wait_for_selector("#error:not([hidden])")
    assert page.locator("#error").inner_text() == "large.png is larger than 20 MB. Make it smaller."
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("pieces", [20, 21])
def test_a_file_of_untold_size_is_bounded(pieces):
    async def stream():
        for _ in range(pieces):
            yield bytes(MAX_BYTES // 20)

    with ThreadPoolExecutor() as pool:  # the browser's loop runs in this thread
        content = pool.submit(anyio.run, read_body, SimpleNamespace(headers={}, stream=stream)).result()
    assert content == (None if pieces > 20 else bytes(MAX_BYTES))


def test_a_file_of_some_megabytes_is_predicted_without_touching_the_disk(server):
    """The server cannot write to any file, see `Server`."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 5 * 2**20
    status, content = server.request("POST", "/predict", file.getvalue())
    assert (status, len(content["rows"])) == (200, len(CLASSES))
    assert list(server.folder.rglob("*")) == []


def test_requests_of_other_sites_are_refused(server, photographs):
    image = photographs["cat"].read_bytes()
    own = urlsplit(server.url).netloc
    assert server.request("POST", "/predict", image, Origin=f"http://{own}")[0] == 200
    for headers in ({"Origin": "http://example.com"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
        assert server.request("POST", "/predict", image, **headers)[0] == 403
    for path in ("/", "/about", "/samples/coffee"):
        assert server.request("GET", path, Host="example.com")[0] == 400
        assert server.request("GET", path, Host=f"localhost:{own.partition(':')[2]}")[0] == 200


def test_headers_and_other_addresses(server):
    for path in ("/", "/about", "/none", "/samples/none", "/../app.py", "/predict"):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == (200 if path in ("/", "/about") else 404)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert (answer.headers["x-content-type-options"], answer.headers["server"]) == ("nosniff", None)
        connection.close()


def test_several_at_once_and_one_that_goes_away(server, photographs):
    port = urlsplit(server.url).port
    for sent in (b"", bytes(1000)):  # before and while the image is sent
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n" + sent)
    names = list(CLASSES) * 2
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: server.request("POST", "/predict", photographs[name].read_bytes()), names))
    assert [(status, content["rows"][0]["name"]) for status, content in answers] == [(200, name) for name in names]


# ----------------------------------------------------------------------------------------------------------------------
# Segmentors and detectors
# ----------------------------------------------------------------------------------------------------------------------


def save_model(config: str, path: Path) -> Path:
    """Save a checkpoint of a config's model with random weights."""
    from sepvit_lib.mm.build import build_model
    from sepvit_lib.mm.config import read_config

    torch.manual_seed(0)
    cfg = read_config(argparse.Namespace(config=str(ROOT / config), cfg_options={}))
    meta = dict(dataset_meta=cfg.test_dataloader.dataset.metainfo.to_dict())
    torch.save({"state_dict": build_model(cfg).state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory) -> Path:
    return save_model(SEGMENTATION, tmp_path_factory.mktemp("segmentor") / "iter_1.pth")


@pytest.fixture(scope="module")
def predictor(segmentor):
    """The page's predictor of it."""
    return loaded("--resume", segmentor, "--config", ROOT / SEGMENTATION)


def loaded(*arguments: object):
    """The predictor of a command line."""
    args = app.build_parser().parse_args(list(map(str, arguments)))
    return app.load_predictor(args, torch.device("cpu"))


def test_segmentor(open_page, photographs, segmentor, predictor, tmp_path_factory):
    """The page shows the labels over the picture, and the backbone's attention."""
    arguments = ["--resume", segmentor, "--config", ROOT / SEGMENTATION, "--device", "cpu"]
    image = read_image(photographs["cat"], "image")
    palette = np.array(predictor.model.dataset_meta["palette"])
    labels = predictor.run(predictor.model, np.asarray(image)).pred_sem_seg.data[0].numpy()
    for server in serving(*arguments, factory=tmp_path_factory):
        assert "serves EncoderDecoder with SepViT_Lite, a segmentor with 11 classes" in server.line
        page = open_page(server.url)
        choose(page, photographs["cat"])
        assert (pixels(page, "picture")[..., :3] == np.asarray(image)).all()
        assert (pixels(page, "overlay")[..., :3] == palette[labels]).all()
        counts = np.bincount(labels.ravel(), minlength=11)
        assert rows(page)[0][0] == predictor.classes[counts.argmax()]
        page.locator("#views input[value='attention']").check()
        assert page.locator("#heat").is_visible()
        assert not page.locator("#overlay").is_visible()
        # The network sees 451 × 300 pixels as 160 × 106: four rows of windows of 28 pixels, six columns.
        assert "of 4 × 6" in page.locator("#reading").inner_text()


def test_detector(photographs, tmp_path):
    """Scores are in order, the picture has the boxes, and attention is recorded in the run itself."""
    path = save_model(DETECTION, tmp_path / "epoch_1.pth")
    predictor = loaded("--resume", path, "--config", ROOT / DETECTION, "--score-thr", "0")
    image = read_image(photographs["cat"], "image")
    answer = predictor.predict(image)
    scores = [row.share for row in answer.rows]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) > 1
    assert answer.picture.size == image.size == answer.overlay.size
    assert (np.asarray(answer.overlay) != np.asarray(image)).any()
    assert answer.blocks[0].label == "0.0"
    assert np.allclose(answer.blocks[0].weights.sum(-1), 1, atol=1e-5)
    assert json.loads(json.dumps(answer.to_json()))["summary"].count(" × ") >= 1


def test_a_backbone_that_runs_several_times_has_no_attention(photographs, segmentor, tmp_path):
    """As with sliding windows. The prediction is shown all the same."""
    config = tmp_path / "slide.py"
    slide = "dict(_delete_=True, mode='slide', crop_size=(96, 96), stride=(64, 64))"
    config.write_text(f"_base_ = {str(ROOT / SEGMENTATION)!r}\nmodel = dict(test_cfg={slide})\n")
    predictor = loaded("--resume", segmentor, "--config", config)
    answer = predictor.predict(read_image(photographs["cat"], "image").resize((120, 80)))
    assert answer.blocks == []
    assert "several times" in answer.note
    assert answer.rows


def test_narrow_and_large_images(predictor):
    """Narrow ones are answered in a sentence, large ones made smaller."""
    with pytest.raises(UserError, match="too narrow"):
        predictor.predict(Image.new("RGB", (12000, 1)))
    assert predictor.predict(Image.new("RGB", (3000, 1500))).picture.size == (1024, 512)
