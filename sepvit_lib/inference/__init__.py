"""Inference with trained networks, shared by `predict.py` and the tools.

from sepvit_lib.inference import load

classifier = load("checkpoint.pth")
classifier("photo.jpg")  # [("cat", 0.98), ("dog", 0.01), …]
classifier.features(["photo.jpg"])  # 1 × C
"""

from sepvit_lib.inference.classifier import load_classifier as load
from sepvit_lib.run.state import Precision

__all__ = ["Precision", "load"]
