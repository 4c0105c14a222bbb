"""The version, in one place: setup.py reads this file as text, so that building imports nothing."""

__version__ = "0.1.0"
