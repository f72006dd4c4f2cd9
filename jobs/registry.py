"""The versions of a registry: list them, show one with the decisions about it, roll the champion back, remove what nothing needs."""

import sys

from lrurec_dist.serve.registry_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], description=__doc__))
