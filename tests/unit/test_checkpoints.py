"""Checkpoints from a server, and damaged checkpoint files."""

import hashlib
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
import small_model
import timm
import torch

from sepvit_lib.common.errors import UserError
from sepvit_lib.run import checkpoints
from sepvit_lib.run.checkpoint_names import StepNames


class Server(BaseHTTPRequestHandler):
    """Serve one file at every path and count requests by path. The first folder of the path selects the behaviour."""

    content = b""
    requests: Counter[str]

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.requests[self.path] += 1
        way = self.path.split("/")[1]
        if way == "missing":
            self.send_error(404)
            return
        if way == "silent":
            time.sleep(1)
            return
        self.send_response(200)
        if way != "without-length":
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content if way == "whole" else self.content[: len(self.content) // 2])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": timm.create_model(small_model.MODEL, img_size=32, num_classes=3).state_dict()}, path)
    return path


@pytest.fixture
def server(weights, tmp_path, monkeypatch):
    """A server with a self-signed certificate that this process trusts: its address and its handler."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    flags = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *flags.split(), *files], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    urllib.request.install_opener(None)  # from Python 3.12 on, it keeps the certificates of its first call
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = type("Handler", (Server,), dict(content=weights.read_bytes(), requests=Counter()))
    http = ThreadingHTTPServer(("localhost", 0), handler)
    http.daemon_threads = True
    http.socket = context.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"https://localhost:{http.server_port}", handler
    http.shutdown()


def test_downloads_are_kept(server, weights, tmp_path):
    """Files of the same name from different addresses are different files."""
    address, handler = server
    name = f"weights-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.pth"
    for folder in ("whole", "whole", "whole/elsewhere"):
        assert checkpoints.read_checkpoint(f"{address}/{folder}/{name}", "--resume").keys() == {"model"}
    assert handler.requests == {f"/whole/{name}": 1, f"/whole/elsewhere/{name}": 1}
    files = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert [path.read_bytes() == weights.read_bytes() for path in files] == [True, True]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("missing/weights.pth", "download failed .*HTTP Error 404: Not Found"),
        ("whole/weights-00000000.pth", "download failed .*invalid hash value"),
        ("truncated/weights.pth", "not a checkpoint, or a damaged one"),
        ("without-length/weights.pth", "not a checkpoint, or a damaged one"),
        ("silent/weights.pth", "download failed .*timed out"),
    ],
)
def test_a_download_that_fails_leaves_nothing(file, words, server, tmp_path, monkeypatch):
    if file.startswith("silent"):
        monkeypatch.setattr(checkpoints, "NETWORK_TIMEOUT", 0.3)
    with pytest.raises(UserError, match=rf"^--resume x: {words}"):
        checkpoints.read_checkpoint(f"{server[0]}/{file}", "--resume x")
    assert socket.getdefaulttimeout() is None
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


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
    monkeypatch.setattr(checkpoints, "hard_link", lambda *_: sys.exit())
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


def test_a_damaged_checkpoint_is_named(tmp_path):
    torch.save({"weight": torch.zeros(10_000)}, tmp_path / "changed.pth")
    content = bytearray((tmp_path / "changed.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"changed\.pth: not a checkpoint, or a damaged one \(Bad CRC-32"):
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
