"""Export of classifiers and backbones, for tools/export.py."""
