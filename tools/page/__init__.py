"""The web page of tools/app.py."""
