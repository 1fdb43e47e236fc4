"""The version of hierens."""

__version__ = "0.1.0"
