"""Lists of the best items for the users of a dataset, from a bundle."""

import sys
from pathlib import Path

from lrurec_dist.stages import run_job

if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            stages=("recommend",),
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
