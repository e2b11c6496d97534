"""Count a detector's parameters and multiply-adds, and the costs of its backbone by stage and kind of operation.

The second stage of a two-stage detector is counted for the boxes that an untrained first stage proposes (at most
1,000), and the mask head for 100 boxes.

python get_flops.py CONFIG [--shape H W] [--memory] [--cfg-options KEY=VALUE …]
"""

if not __package__:
    import _repository  # noqa: F401
import sys

from mmdet.structures import DetDataSample

from sepvit_lib.mm.commands.get_flops import run_count


def samples(height: int, width: int) -> list[DetDataSample]:
    """Make the image metadata that the first stage needs to propose boxes, from the image size in pixels."""
    return [DetDataSample(metainfo=dict(img_shape=(height, width), scale_factor=(1.0, 1.0)))]


if __name__ == "__main__":
    sys.exit(run_count(__doc__, (800, 1280), samples=samples))
