"""Code shared by the repository's commands, installed next to `sepvit.py`."""
