"""Shared by all commands: argument parsing, one-line errors, processes, devices, files. Imports no other subpackage."""
