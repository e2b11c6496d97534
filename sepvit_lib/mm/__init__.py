"""Shared by segmentation and detection: the registered backbones, and commands built on mmengine's runner.

If mmcv was installed without its compiled operators, importing any module of this package makes torchvision's
operators available to mmcv.
"""

from sepvit_lib.mm.operators import offer

offer()
