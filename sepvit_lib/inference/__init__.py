"""What `predict.py`, and `visualize.py`, `export.py` and `app.py` of `tools/` share: from an image to a prediction."""
