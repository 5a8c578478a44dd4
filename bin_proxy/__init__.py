"""bin-proxy keeps a host's binaries at the release that bin-manager names."""

__version__ = "1.0.0"
