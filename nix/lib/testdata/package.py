"""A package as the version reader meets it."""

__version__ = "1.2.3"
