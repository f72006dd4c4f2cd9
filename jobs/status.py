"""The last nights below a directory, as a table: date, state, events, quality against yesterday, hours, what serves."""

import sys

from lrurec_dist.nightly.history import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], description=__doc__))
