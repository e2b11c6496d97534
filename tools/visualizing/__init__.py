"""Figures of what a network attends to and has learned, for tools/visualize.py."""
