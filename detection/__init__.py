"""The commands of detection. Importing the package provides mmcv's operators, which mmdet needs at import."""

import sepvit_lib.mm  # noqa: F401
