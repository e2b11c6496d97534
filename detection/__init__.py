"""The commands, configs and backbones of detection. The import makes mmcv's operators available to mmdet."""

import sepvit_lib.mm  # noqa: F401
