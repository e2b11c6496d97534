"""The commands, configs and backbones of detection. Importing it provides mmcv's operators, which mmdet needs."""

import sepvit_lib.mm  # noqa: F401
