"""Versions: of the package, and of what it follows."""

__version__ = "0.1.0"
__commit__ = ""  # releases are known by their version
RAY_VERSION = "2.60.0"  # of Ray Core, whose names and behaviour these are
