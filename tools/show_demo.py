"""Show the demo's result: top-1 at the end of training, top-1 of the saved checkpoint, and the curves' path.

    python tools/show_demo.py --run DIR [--least 95]

The exit status is 1 if the two top-1 accuracies differ, or if they are below `--least`.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import json
import sys
from pathlib import Path

from sepvit_lib.common.command_line import Parser, number, path, run_command
from sepvit_lib.common.errors import UserError


def read_top1(run: str, name: str, advice: str) -> float:
    """Read the last top-1 (%) from a file of JSON objects, one per line.

    Args:
        run: the run's output folder.
        name: the file's name.
        advice: how to produce the file, for messages.

    Raises:
        UserError: the file is missing, or has no top-1.
    """
    try:
        entries = [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]
        return float([entry["test_acc1"] for entry in entries if "test_acc1" in entry][-1])
    except (OSError, ValueError, LookupError, TypeError) as error:  # not a number, not JSON, or missing
        raise UserError(f"--run {run}: {name} has no top-1 ({error}); {advice}") from None


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=path, required=True, metavar="DIR", help="the run's output folder")
    parser.add_argument("--least", type=number(float, 0, 100), default=95.0, help="minimum top-1 (%%), default 95")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print both top-1 accuracies and the path of the curves.

    Raises:
        UserError: the folder does not contain both accuracies.
        SystemExit: the accuracies differ, or are too low.
    """
    trained = read_top1(args.run, "log.txt", f"train to the end with main.py --output_dir {args.run}")
    evaluated = read_top1(args.run, "eval.json", f"evaluate with main.py --eval --output_dir {args.run}")
    print(f"top-1 at the end of training:          {trained:.2f} %")
    print(f"top-1 of the checkpoint, by --eval:    {evaluated:.2f} %")
    print(f"loss, accuracy and learning rate:      {Path(args.run) / 'curves.png'}")
    if trained != evaluated:
        sys.exit("the two values of top-1 differ")
    if trained < args.least:
        sys.exit(f"below the {args.least:g} % that the demo must reach")


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    Raises:
        SystemExit: the two top-1 accuracies differ, or are too low.
    """
    parser = build_parser()
    return run_command("show_demo.py", lambda: main(parser.parse_args(arguments)), parser)


if __name__ == "__main__":
    sys.exit(run())
