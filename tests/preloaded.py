"""What the ranks of tests need, imported once by the process that they are forked from; see `tests/processes.py`."""

import gc
import importlib
import os

# before DeepSpeed is imported, as `prepare_process` does it, whose other settings are left to each rank
os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")
for name in ("lrurec_dist.train.loop", "torch._dynamo", "hypothesis", "pytest", "pyarrow.parquet"):
    importlib.import_module(name)
gc.freeze()  # DeepSpeed collects garbage at every start of its stage 3, and a million objects that stay need not be looked through
