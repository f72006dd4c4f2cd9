"""States of the users of a dataset, from a bundle, for serving to start with."""

import sys
from pathlib import Path

from lrurec_dist.stages import run_job

if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            stages=("states",),
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
