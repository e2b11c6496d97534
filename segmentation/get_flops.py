"""Count the parameters and multiply-adds of a whole segmentor.

python get_flops.py CONFIG [--shape H W] [--cfg-options KEY=VALUE …]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dense.flops import run_count

if __name__ == "__main__":
    sys.exit(run_count(__doc__, (512, 512)))
