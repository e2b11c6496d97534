"""Show what the demo reached: top-1 at the end of training and of the saved checkpoint, and where the curves are.

    python tools/show_demo.py --run DIR [--least 95]

Exits with 1 where the two figures differ or the top-1 is below `--least`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training.commands import Parser, number, path, run_command
from utils import UserError


def read_top1(run: str, name: str, advice: str) -> float:
    """The last top-1 in a file that a run writes, of which each line is a JSON object.

    Args:
        run: the run's output folder.
        name: of the file.
        advice: what to do to have it there.

    Raises:
        UserError: it is not there, or has no top-1 there.
    """
    try:
        entries = [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]
        return float([entry["test_acc1"] for entry in entries if "test_acc1" in entry][-1])
    except OSError as error:
        raise UserError(f"--run {run}: {name} cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, LookupError, TypeError):  # no JSON, no line or no such figure, another kind of value
        raise UserError(f"--run {run}: {name} has no top-1; {advice}") from None


def build_parser() -> Parser:
    """The command's settings."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=path, required=True, metavar="DIR", help="the run's output folder")
    parser.add_argument(
        "--least", type=number(float, 0, 100), default=95.0, help="top-1 in %% that the demo is to reach"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the figures.

    Raises:
        UserError: the folder does not have them.
        SystemExit: they are not as they should be.
    """
    trained = read_top1(args.run, "log.txt", f"train to the end with main.py --output_dir {args.run}")
    evaluated = read_top1(args.run, "eval.json", f"evaluate with main.py --eval --output_dir {args.run}")
    print(f"top-1 at the end of training:          {trained:.2f} %")
    print(f"top-1 of the checkpoint, by --eval:    {evaluated:.2f} %")
    print(f"loss, accuracy and learning rate:      {Path(args.run) / 'curves.png'}")
    if trained != evaluated:
        sys.exit("the two figures differ")
    if trained < args.least:
        sys.exit(f"below the {args.least:g} % that the demo is to reach")


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    return run_command("show_demo.py", lambda: main(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(run())
