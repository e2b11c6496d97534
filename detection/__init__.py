"""The commands, configs and backbones of detection. Importing them makes mmcv's operators available to mmdet."""

import sepvit_lib.mm  # noqa: F401
