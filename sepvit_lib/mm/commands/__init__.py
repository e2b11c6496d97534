"""The commands of segmentation and detection, built on mmengine's runner."""
