"""Checkpoints from a server that stalls, truncates or redirects, and damaged checkpoint files."""

import hashlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL, SMALLEST, Code, command

from sepvit_lib.training import checkpoints
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.naming import StepNames


class Server(BaseHTTPRequestHandler):
    """Serve one file at every path and count requests by path. The first folder of the path selects the behaviour."""

    content = b""
    requests: dict[str, int]

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        count = self.requests[self.path] = self.requests.get(self.path, 0) + 1
        way = self.path.split("/")[1]
        if way == "redirect":
            self.send_response(302)
            self.send_header("Location", self.path.replace("redirect", "whole"))
            self.end_headers()
            return
        if way == "missing" or (way == "busy" and count < 3):
            self.send_error(404 if way == "missing" else 503)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if way != "without-parts" else 0
        body = self.content[start:]
        self.send_response(206 if start else 200)
        if way != "without-length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if way == "wrong":
            body = bytes(len(body))
        if way == "pieces":
            self.wfile.write(body[: len(self.content) // 7])
        elif way in ("truncated", "stalled", "without-parts", "without-length") and count < 3:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if way == "stalled":
                time.sleep(3)
        else:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": timm.create_model("SepViT_Lite", img_size=32, num_classes=3).state_dict()}, path)
    return path


@pytest.fixture
def server(weights, tmp_path, monkeypatch):
    """A server with a self-signed certificate that this process trusts: its address and its handler."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext".split(),
            *"subjectAltName=DNS:localhost -keyout".split(),
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    urllib.request.install_opener(None)  # from Python 3.12 on, it keeps the certificates of its first call
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = type("Handler", (Server,), dict(content=weights.read_bytes(), requests={}))
    http = ThreadingHTTPServer(("localhost", 0), handler)
    http.daemon_threads = True
    http.socket = context.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"https://localhost:{http.server_port}", handler
    http.shutdown()


@pytest.mark.parametrize("way", ["whole", "redirect", "truncated", "stalled", "without-parts", "busy", "pieces"])
def test_download(way, server, weights, tmp_path):
    address, handler = server
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    path = tmp_path / "out" / f"weights-{digest}.pth"
    checkpoints.download(f"{address}/{way}/{path.name}", path, stall=1 if way == "stalled" else 60)
    assert path.read_bytes() == weights.read_bytes()
    assert list(path.parent.iterdir()) == [path]
    expected = dict(whole=1, redirect=1, pieces=8)  # pieces: more than the failures allowed in a row
    assert handler.requests[f"/{way}/{path.name}"] == expected.get(way, 3)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("missing", "HTTP Error 404: Not Found"),
        ("wrong", "does not have the hash in its name"),
        ("without-length", "is damaged (truncated)"),
    ],
)
def test_download_that_fails_leaves_nothing(way, words, server, tmp_path):
    address, _ = server
    path = tmp_path / "out" / ("weights-00000000.pth" if way == "wrong" else "weights.pth")
    with pytest.raises(UserError) as refusal:
        checkpoints.download(f"{address}/{way}/{path.name}", path, stall=1)
    assert words in str(refusal.value)
    assert not list(path.parent.iterdir())


def test_leftovers_of_a_killed_download_are_deleted(server, tmp_path):
    address, _ = server
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    left, running = (tmp_path / f"weights.pth.{host}-{pid}.partial" for pid in (dead.pid, os.getppid()))
    for path in (left, running):
        path.write_text("half")
    checkpoints.download(f"{address}/whole/weights.pth", tmp_path / "weights.pth")
    assert {path.name for path in tmp_path.iterdir()} >= {"weights.pth", running.name}
    assert not left.exists()


def test_download_that_is_never_complete(server, tmp_path):
    address, handler = server
    handler.requests = type("Ever", (dict,), dict(get=lambda *_: 0))()
    path = tmp_path / "out/weights.pth"
    with pytest.raises(
        UserError, match=r"download failed \(the connection ended after \d+ of \d+ bytes\) after 3 attempts"
    ):
        checkpoints.download(f"{address}/without-parts/weights.pth", path, stall=1, attempts=3)
    assert not list(path.parent.iterdir())


def test_resume_from_the_web(server, few_digits, tmp_path):
    """A second run reuses the download. Another file of the same name is downloaded separately."""
    address, handler = server
    for place in ("whole", "whole", "whole/elsewhere"):
        result = command("--eval", "--resume", f"{address}/{place}/weights.pth", *SMALL, "--data-path", few_digits)
        assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "hub/hub/checkpoints").glob("*/weights.pth"))) == 2
    assert handler.requests == {"/whole/weights.pth": 1, "/whole/elsewhere/weights.pth": 1}


@pytest.mark.parametrize("flag", ["--resume", "--finetune", "--teacher-path"])
def test_code_in_a_checkpoint_never_runs(flag, few_digits, tmp_path):
    torch.save({"model": {}, "args": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    distillation = ["--distillation-type", "hard", "--teacher-model", "SepViT_Lite"]
    result = command(
        *SMALLEST,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        flag,
        tmp_path / "code.pth",
        *(distillation if flag == "--teacher-path" else []),
    )
    assert result.returncode == 2
    assert f"main.py: {flag} {tmp_path / 'code.pth'}: refused, it holds" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_flipped_bit_anywhere_is_detected(tmp_path):
    """Or it changes nothing that is read. Covers each bit of the zip directory and a sample of the others."""
    checkpoint = {"model": {"weight": torch.arange(64.0), "bias": torch.ones(64)}, "steps": 2}
    older, newer = (tmp_path / StepNames.FORMAT.format(steps) for steps in (1, 2))
    for path in (older, newer):
        torch.save(checkpoint, path)
    content = newer.read_bytes()
    with zipfile.ZipFile(newer) as archive:
        directory = 8 * archive.start_dir
    found = 0
    bits = [*range(0, directory, 13), *range(directory, 8 * len(content))]
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        newer.write_bytes(changed)
        good = checkpoints.newest_good(tmp_path, StepNames(2))
        if good == newer:
            same = checkpoints.read_checkpoint(str(newer), "--resume")
            assert same["steps"] == 2
            assert all(torch.equal(same["model"][name], value) for name, value in checkpoint["model"].items())
        else:
            assert good == older
            found += 1
    assert found > len(bits) / 2


def test_the_best_checkpoint_is_written_first(tmp_path, monkeypatch):
    """A run killed before the checkpoint gets its other names repeats the epoch and finds the same best."""
    monkeypatch.setattr(checkpoints, "name_also", lambda *_: sys.exit())
    writer = checkpoints.CheckpointWriter(tmp_path, StepNames(2))
    writer.save(dict(steps=3, epoch=0, epoch_step=0), is_best=True)
    with pytest.raises(SystemExit):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_best.pth"]


def test_optimizer_state_gets_the_parameters_memory_format():
    """Fused optimiser steps refuse any other."""
    network = torch.nn.Conv2d(3, 4, 3)
    network(torch.ones(1, 3, 8, 8)).sum().backward()
    before = torch.optim.AdamW(network.parameters())
    before.step()
    network.to(memory_format=torch.channels_last)
    after = torch.optim.AdamW(network.parameters())
    checkpoints.load_optimizer(after, network, before.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        value = after.state[network.weight][name]
        assert value.stride() == network.weight.stride()
        assert torch.equal(value, before.state[network.weight][name])


def test_a_damaged_checkpoint_is_named(weights, few_digits, tmp_path):
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"changed\.pth: damaged, wrong checksum of data/"):
        checkpoints.read_checkpoint(str(tmp_path / "changed.pth"), "--resume changed.pth")


def test_a_deleted_checkpoint_is_reported(tmp_path):
    """Processes that outlive torchrun may delete the oldest checkpoint while another run checks the folder."""
    assert "No such file" in checkpoints.damage(tmp_path / "checkpoint-00000008.pth")


def test_copies_keep_the_class_and_share_no_tensor():
    state = OrderedDict(weights=torch.ones(2), milestones=Counter([3, 3, 5]), nested=[{"a": torch.zeros(1)}])
    twin = checkpoints.copied(state)
    state["weights"].zero_()
    state["nested"][0]["a"].add_(1)
    assert type(twin) is OrderedDict
    assert twin["milestones"] == Counter({3: 2, 5: 1})
    assert torch.equal(twin["weights"], torch.ones(2))
    assert torch.equal(twin["nested"][0]["a"], torch.zeros(1))
