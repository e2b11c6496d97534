"""The commands of detection. Importing the package offers mmcv's operators, which mmdet looks for at its import."""

import sepvit_lib.dense  # noqa: F401
