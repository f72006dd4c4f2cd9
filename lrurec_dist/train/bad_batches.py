"""`<run>/bad_batches.jsonl`: where in the data order losses were not finite."""

import json

import torch

from lrurec_dist import collectives, storage
from lrurec_dist.train.transfer import StepBatch

BAD_BATCHES = "bad_batches.jsonl"


class BadBatches:
    """One rank's memory of the losses since the last report, so that looking at them need not wait for a GPU."""

    def __init__(self, run_dir: str) -> None:
        self._url = storage.join(run_dir, BAD_BATCHES)
        self._seen: list[tuple[dict[str, int], torch.Tensor]] = []

    def remember(self, batch: StepBatch, loss_sum: torch.Tensor) -> None:
        """Keep a batch's address and this rank's loss on it, until `forget`."""
        self._seen.append(({"epoch": batch.epoch, "group": batch.group, "batch": batch.batch}, loss_sum.detach()))

    def forget(self) -> None:
        """Forget what was remembered."""
        self._seen.clear()

    def keep_first(self) -> None:
        """Append the first remembered address whose loss was not finite on this rank, if there is one, and forget all."""
        ranks = {"rank": collectives.rank(), "workers": collectives.world_size()}
        for address, loss_sum in self._seen:
            if not loss_sum.isfinite():
                storage.append_line(self._url, json.dumps({**address, **ranks, "loss_sum": str(loss_sum.item())}))
                break
        self.forget()
