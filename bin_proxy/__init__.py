"""bin-proxy keeps a host's binaries at the release that bin-manager names."""

import gc

gc.set_threshold(100_000, 50, 50)  # a run is short: collecting while modules are imported costs more than it frees

__version__ = "1.0.0"
