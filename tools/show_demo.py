"""Show what the demo reached: top-1 at the end of training and of the saved checkpoint, and where the curves are.

    python tools/show_demo.py --run DIR [--least 95]

Exits with 1 where the two figures differ or the top-1 is below `--least`.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's output folder")
    parser.add_argument("--least", type=float, default=95.0, help="top-1 in %% that the demo is to reach")
    args = parser.parse_args()
    trained = json.loads((args.run / "log.txt").read_text().splitlines()[-1])["test_acc1"]
    evaluated = json.loads((args.run / "eval.json").read_text())["test_acc1"]
    print(f"top-1 at the end of training:          {trained:.2f} %")
    print(f"top-1 of the checkpoint, by --eval:    {evaluated:.2f} %")
    print(f"loss, accuracy and learning rate:      {args.run / 'curves.png'}")
    if trained != evaluated:
        print("the two figures differ", file=sys.stderr)
        return 1
    if trained < args.least:
        print(f"below the {args.least:g} % that the demo is to reach", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
