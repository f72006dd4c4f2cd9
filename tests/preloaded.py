"""What the ranks of tests need, imported once by the process that they are forked from; see `tests/processes.py`."""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # ranks of tests compute there, whatever DeepSpeed would find
for name in ("lrurec_dist.train.loop", "hypothesis", "pytest", "pyarrow.parquet"):
    importlib.import_module(name)
