"""Training alone, on a prepared dataset and without Ray: torchrun --nproc-per-node 2 jobs/train_torchrun.py CONFIG key=value."""

import sys
from pathlib import Path

from lrurec_dist.train.standalone import main

if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1:],
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
