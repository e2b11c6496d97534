"""What segmentation and detection share: the registered backbones, and the commands around mmengine's runner."""
