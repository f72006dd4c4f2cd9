"""How a training process uses its machine."""

import os
import re
import subprocess
import sys

import pytest

# Copies 32 MiB again and again; prints page faults of the last copies as they would be by default and as arranged.
PROGRAM = """
import resource, sys, torch
from lrurec_dist.model.process import keep_freed_memory
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


SHAPES = """
import ctypes, sys, torch
from lrurec_dist.model.process import arrange_cpu, multiply_by_onednn
arrange_cpu() if sys.argv[1] == "arranged" else multiply_by_onednn()

class MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = MallocInfo
weight = torch.randn(64, 256).bfloat16()

def multiply(shapes):
    for rows in shapes:
        torch.randn(rows, 64).bfloat16() @ weight
    return mallinfo().uordblks

before = multiply(range(1000, 1150))
print((multiply(range(1150, 1300)) - before) / 150)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux with glibc, whose malloc is asked")
def test_products_of_ever_new_shapes_do_not_take_ever_more_memory() -> None:
    grown = {}
    capacities = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # which another test may have arranged here
    environment = {name: value for name, value in os.environ.items() if name not in capacities}
    for kind in ("default", "arranged"):
        done = subprocess.run([sys.executable, "-c", SHAPES, kind], env=environment, capture_output=True, text=True, check=True)
        grown[kind] = float(done.stdout)
    assert abs(grown["arranged"]) < 5_000, grown
    if grown["default"] < 50_000:
        pytest.skip(
            f"nothing to bound here, {grown} bytes a shape: needs a processor whose bfloat16 products oneDNN compiles by shape (AMX)"
        )


PRODUCTS = """
import torch
from lrurec_dist.model.process import multiply_by_onednn
multiply_by_onednn()
torch.manual_seed(0)
for rows, inner, columns in [(3, 64, 64), (400, 64, 300), (896, 2048, 64), (64, 900, 256)]:
    for left, right in [(torch.randn(rows, inner), torch.randn(inner, columns)), (torch.randn(inner, rows).T, torch.randn(columns, inner).T)]:
        exact = left.double() @ right.double()
        error = (left @ right - exact).abs().max() / (left.double().abs() @ right.double().abs()).max()
        assert error < 1e-6, (rows, inner, columns, error)  # factors in bfloat16 would give 1e-3
print("fine")
"""


def test_products_stay_float32_whoever_multiplies() -> None:
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert done.stdout == "fine\n"


def openmp_says(environment: dict[str, str], program: str) -> str:
    """How often threads of a process look for what they wait for before they sleep, as OpenMP itself has it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert len(found) == 1, done.stderr
    return str(found[0])


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's OpenMP")
def test_threads_that_wait_do_not_take_a_core_for_long_unless_the_user_says_so() -> None:
    ours = "from lrurec_dist.model.lrurec import LRURec"
    assert openmp_says({}, ours) == "10000"
    assert openmp_says({"GOMP_SPINCOUNT": "7"}, ours) == "7"
    assert openmp_says({"OMP_WAIT_POLICY": "ACTIVE"}, ours) == openmp_says({"OMP_WAIT_POLICY": "ACTIVE"}, "import torch")
