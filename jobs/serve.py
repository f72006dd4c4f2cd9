"""The HTTP service: recommendations from the registry's champion, until it is stopped."""

import sys
from pathlib import Path

from lrurec_dist.run_directory import run_command
from lrurec_dist.serve.http_server import serve

if __name__ == "__main__":
    sys.exit(
        run_command(
            sys.argv[1:],
            serve,
            description=__doc__,
            default_config=str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"),
        )
    )
