"""LRURec at industrial scale: interaction logs in, a servable sequential recommender out."""

import os

__version__ = "0.1.0"

PAD_ID = 0  # left padding; never a catalogue item

# Threads that wait for each other look for it so many times before they sleep. By default that is milliseconds of a core that
# somebody else may need: decision 38. Read when PyTorch is loaded, so it is set before anything else here can load it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
