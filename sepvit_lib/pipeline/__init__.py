"""The input pipeline: from image files and archives to a loader's samples."""
