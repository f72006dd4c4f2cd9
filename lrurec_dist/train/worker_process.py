"""What a process that trains sets for itself, whoever started it."""

import os

import torch

from lrurec_dist.model.process import arrange_cpu


def prepare_process(cuda: bool) -> None:
    """Settings to make before DeepSpeed is imported."""
    # DeepSpeed decorates an optimizer that is not ours with torch.compile, and that loads the compiler: a second of each start
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it takes a GPU it sees
        arrange_cpu()


def set_threads(threads: int, local_workers: int) -> None:
    """Let torch compute on so many threads; 0: this machine's cores / workers on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_workers))
