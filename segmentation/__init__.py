"""The commands, configs and backbones of segmentation."""
