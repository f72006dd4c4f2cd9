"""Log to sequence dataset."""

import sys
from pathlib import Path

from lrurec_dist.stages import run_job

if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            stages=("prepare",),
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
