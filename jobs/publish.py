"""A run's bundle through the gate: it becomes its registry's champion, or the reasons are recorded and the champion stays (10)."""

import sys
from pathlib import Path

from lrurec_dist.stages import run_job

if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            stages=("publish",),
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
