"""Inference with trained networks, shared by `predict.py` and the tools."""
