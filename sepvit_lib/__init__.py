"""What the commands of the repository share, and what `pip install` puts beside `sepvit.py`."""
