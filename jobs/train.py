"""The whole path: log to verified bundle. Without arguments: the quickstart."""

import sys
from pathlib import Path

from lrurec_dist.stages import run_job

if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            stages=("prepare", "train", "evaluate", "bundle"),
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
