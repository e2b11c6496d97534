"""Count the parameters and multiply-adds of a whole detector.

A two-stage detector's second stage counts as often as an untrained first stage proposes boxes (at most 1,000), its mask
head 100 times.

python get_flops.py CONFIG [--shape H W] [--cfg-options KEY=VALUE …]
"""

import sys
from pathlib import Path

from mmdet.structures import DetDataSample

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dense.flops import run_count


def samples(height: int, width: int) -> list[DetDataSample]:
    """An image's data for the first stage's proposals."""
    return [DetDataSample(metainfo=dict(img_shape=(height, width), scale_factor=(1.0, 1.0)))]


if __name__ == "__main__":
    sys.exit(run_count(__doc__, (800, 1280), samples=samples))
