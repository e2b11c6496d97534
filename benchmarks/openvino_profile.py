"""Print where OpenVINO's time goes in SepViT and its peers: the share of each kind of operator in its own profile.

python benchmarks/openvino_profile.py [--model SepViT_Tiny] [--peers class] [--batch-size 1] [--before FILE]
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import sepvit
from benchmarks.benchmark import chosen_peers
from benchmarks.subjects import Setting, Subject, check_packages, export, load_before, openvino_model
from sepvit_lib.common.command_line import Parser, path, positive_int, run_command
from sepvit_lib.common.devices import available_cores
from sepvit_lib.inference.exported import compile_openvino
from sepvit_lib.rounds import reason

MULTIPLYING = ("FullyConnected", "Convolution", "GroupConvolution")  # linear layers and convolutions


def milliseconds(subject: Subject, setting: Setting, rounds: int) -> Counter[str]:
    """Mean milliseconds of each kind of operator in a call."""
    with tempfile.TemporaryDirectory() as folder:
        model = openvino_model(export(subject, setting, Path(folder)), subject, setting)
    compiled = compile_openvino(model, subject.number_format, setting.threads, profile=True)
    request, images, sums = compiled.create_infer_request(), setting.images().numpy(), Counter[str]()
    for number in range(2 * rounds):
        request.infer([images])
        for entry in request.profiling_info if number >= rounds else ():  # the first half warms up
            sums[entry.node_type] += 1000 * entry.real_time.total_seconds() / rounds
    return sums


def main(args: argparse.Namespace) -> None:
    """Print a table for each network."""
    check_packages(["openvino"], [args.number_format], "openvino_profile.py")
    setting = Setting(
        "latency", torch.device("cpu"), args.batch_size, (224, 224), False, args.threads, args.before or ""
    )
    peers = chosen_peers(args)
    subjects = [Subject(name, "openvino", args.number_format) for name in (args.model, *peers)]
    if args.before:
        load_before(args.before)  # raises an error for a file that cannot be loaded
        subjects.insert(1, Subject(args.model, "openvino-before", args.number_format))
    for subject in subjects:
        try:
            sums = milliseconds(subject, setting, args.rounds)
        except Exception as error:  # networks that ONNX cannot express
            print(f"{subject}: {reason(error)}")
            continue
        total = sum(sums.values())
        share = 100 * sum(time for kind, time in sums.items() if kind.startswith(MULTIPLYING)) / total
        print(f"{subject}: {total:.1f} ms, linear layers and convolutions {share:.1f} %")
        print("  " + ", ".join(f"{kind} {100 * time / total:.1f} %" for kind, time in sums.most_common(9)), flush=True)


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(dense=False)
    add = parser.add_argument
    add("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    add("--peers", nargs="+", default=["class"], metavar="NAME", help="as for benchmark.py")
    add("--number-format", default="float32", choices=["float32", "bfloat16", "int8"])
    add("--batch-size", type=positive_int, default=1, metavar="N")
    add("--before", type=path, default=None, metavar="FILE", help="also measure a different revision of sepvit.py")
    add("--rounds", type=positive_int, default=20, help="timed calls, after as many that are not timed")
    add("--threads", type=positive_int, default=available_cores(), help="CPU threads")
    return run_command("openvino_profile.py", lambda: main(parser.parse_args(arguments)), parser)


if __name__ == "__main__":
    sys.exit(run())
