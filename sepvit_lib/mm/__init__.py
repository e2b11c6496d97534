"""Shared by segmentation and detection: the registered backbones, and commands built on mmengine's runner.

Importing any module of this package makes torchvision's operators available to mmcv where it has no compiled ones.
"""

from sepvit_lib.mm.operators import offer

offer()
