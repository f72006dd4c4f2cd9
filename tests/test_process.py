"""How a training process uses its machine."""

import subprocess
import sys

import pytest

# Copies 32 MiB again and again; prints page faults of the last copies as they would be by default and as arranged.
PROGRAM = """
import resource, sys, torch
from lrurec_dist.train.process import keep_freed_memory
arranged = keep_freed_memory() if sys.argv[1] == "kept" else False
x = torch.ones(8 << 20)
for _ in range(40):  # malloc leaves a few holes at first, that alignment makes too small to use again
    x.clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    x.clone()
print(arranged, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux with glibc, whose malloc is set")
def test_a_training_process_does_not_fault_its_buffers_in_again_at_every_step() -> None:
    results = {}
    for kind in ("default", "kept"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True)
        arranged, faults = done.stdout.split()
        assert arranged == str(kind == "kept")
        results[kind] = int(faults)
    # One copy in five may still land in a new hole; without the setting each of them faults on every page.
    assert results["default"] > 3 * results["kept"], results
    assert results["default"] > 1000, f"without it every copy faults, or the setting would be of no use: {results}"
