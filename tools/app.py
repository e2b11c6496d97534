"""Serve a page to try a trained network: drop an image, and see its prediction and attention.

    python tools/app.py --resume PATH [--host 127.0.0.1] [--port 8000]
    python tools/app.py --resume CHECKPOINT --config segmentation/configs/NAME.py

PATH is a checkpoint of main.py or of the published code, a folder in timm's layout, or a file that tools/export.py
wrote. The page shows the five most probable classes, and the attention among windows. With `--config`, PATH is a
checkpoint of a segmentor or detector, whose prediction is drawn over the image. Nothing is loaded from other machines,
and images are not written to disk.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import ipaddress
import socket
import sys
from pathlib import Path

import torch
from PIL import Image

from sepvit_lib.common.command_line import Parser, fraction, number, path, run_command
from sepvit_lib.common.devices import best_device, check_device
from sepvit_lib.common.errors import UserError, one_line
from sepvit_lib.common.packages import require
from sepvit_lib.common.processes import print_line
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.run.state import Precision
from tools.page.predictors import ClassifierPredictor, Predictor
from tools.page.samples import load_samples

HOST, PORT = "127.0.0.1", 8000
DENSE_PACKAGES = ("mmengine", "mmcv", "mmseg", "mmdet")


def main(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the network cannot be loaded, a package is missing, or the address is not available.
    """
    check_combinations(args)
    require("the page", "starlette", "uvicorn")
    device_name = args.device or best_device()
    check_device(device_name)
    device = torch.device(device_name)
    with listen(args.host, args.port) as listener:
        predictor = load_predictor(args, device)
        samples = load_samples(predictor.kind, predictor.classes)
        predictor.predict(Image.new("RGB", (128, 128)))  # warm up
        from tools.page.server import build_application, serve

        predictor.facts |= {"resume": one_line(Path(args.resume).name), "device": device_name}
        application = build_application(predictor, samples, is_loopback(listener))
        print_line(f"{address_of(listener, args.host)} serves {predictor.title}; press Ctrl-C to stop")
        serve(application, listener)


def load_predictor(args: argparse.Namespace, device: torch.device) -> Predictor:
    """Load the network of the command line.

    Raises:
        UserError: the network cannot be loaded, or a package is missing.
    """
    if not args.config:
        return ClassifierPredictor(load_classifier(args.resume, args.model, args.averaged, Precision(device, None)))
    require(f"--config {args.config}", *DENSE_PACKAGES, extra="mm")
    from tools.page.dense import load_dense_predictor

    return load_dense_predictor(args.config, args.resume, device, args.score_thr)


def check_combinations(args: argparse.Namespace) -> None:
    """Refuse incompatible settings.

    Raises:
        UserError: a setting does not apply to this kind of network.
    """
    if args.config:
        given = [flag for flag, value in (("--model", args.model), ("--averaged", args.averaged)) if value]
        if given:
            raise UserError(f"{given[0]}: only for classifiers; omit it, or omit --config {args.config}")
    elif args.score_thr is not None:
        raise UserError(f"--score-thr {args.score_thr}: only for detectors; omit it, or pass the --config of one")


# ----------------------------------------------------------------------------------------------------------------------
# Address
# ----------------------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Args:
        host: name or address of a network interface of this machine.
        port: TCP port; 0 for any free one.

    Raises:
        UserError: the host is unknown or not on this machine, or the port is in use or not permitted.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        advice = f"choose an address of this machine, such as {HOST}, and a free port (0: any)"
        raise UserError(f"--host {host} --port {port}: {error.strerror}; {advice}") from None


def is_loopback(listener: socket.socket) -> bool:
    """Whether a listening socket is reachable only from this machine."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address_of(listener: socket.socket, host: str) -> str:
    """URL of the page for a browser on this machine.

    Args:
        listener: the listening socket.
        host: `--host`.
    """
    address, port = listener.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Make the command's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--resume", required=True, type=path, metavar="PATH", help="checkpoint or exported file")
    add("--config", type=path, metavar="CONFIG", help="config of the segmentor or detector in PATH")
    add("--model", default="", metavar="NAME", help="timm's name of the network, if PATH does not specify it")
    add("--averaged", action="store_true", help="use the checkpoint's averaged weights")
    add("--score-thr", type=fraction, metavar="SCORE", help="minimum score of a detection, default 0.3")
    reach = f"address to listen on, default {HOST} (only reachable from this machine); 0.0.0.0: all interfaces"
    add("--host", default=HOST, help=reach)
    add("--port", type=number(int, 0, 65535), default=PORT, help=f"port to listen on, default {PORT}; 0: a free one")
    add("--device", help="cuda, mps or cpu, default the best available")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 after Ctrl-C, 2 for a user's mistake."""
    parser = build_parser()
    return run_command("app.py", lambda: main(parser.parse_args(arguments)), parser, "choose another --device")


if __name__ == "__main__":
    sys.exit(run())
