"""Shared by segmentation and detection: the registered backbones, and commands built on mmengine's runner.

Importing any module of this package offers torchvision's operators to mmcv, if mmcv is without its compiled ones.
"""

from sepvit_lib.mm.operators import offer

offer()
