"""Count a segmentor's parameters and multiply-adds, and the costs of its backbone by stage and kind of operation.

python get_flops.py CONFIG [--shape H W] [--memory] [--cfg-options KEY=VALUE …]
"""

if not __package__:
    import _repository  # noqa: F401
import sys

from sepvit_lib.mm.commands.get_flops import run_count

if __name__ == "__main__":
    sys.exit(run_count(__doc__, (512, 512)))
