"""A night: new partitions merged, a model trained on from yesterday's, evaluated, put through the gate, published."""

import sys
from pathlib import Path

from lrurec_dist.nightly.night import run_nights
from lrurec_dist.run_directory import run_command

if __name__ == "__main__":
    sys.exit(
        run_command(
            sys.argv[1:],
            run_nights,
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
