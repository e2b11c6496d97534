"""Shared by segmentation and detection: the registered backbones, and commands built on mmengine's runner."""
