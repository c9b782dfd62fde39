"""A program: the copies of the prefetcher and of the saver on the pretended GPU, as they are and without each safeguard.

    cd tests; python -m pretended_gpu.safeguards

It prints as JSON, for each, the races that the pretended GPU found.
"""

import contextlib
import gc
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from pretended_gpu.cuda import Unsupported, install
from pretended_gpu.streams import DEFAULT, RECORD, Stream
from pretended_gpu.tensors import GpuTensor
from shared.data.loading import Batch, PrefetchLoader
from shared.training.saving import HostCopy


def prefetch():
    """Trains on five batches, which a stream of their own copies and prepares."""
    mean = torch.ones(1, device="cuda")
    weight = torch.ones(8, device="cuda", requires_grad=True)
    on_host = [
        Batch(torch.full((4, 8), i, dtype=torch.uint8), {"number": [torch.tensor([i])]}, [i]).pin_memory()
        for i in range(5)
    ]

    def prepare(batch, number):
        return Batch(batch.images.float() - mean, batch.targets, batch.image_ids)

    for batch in PrefetchLoader(on_host, torch.device("cuda", 0), prepare):
        (batch.images * weight).sum().backward()
        del batch


def save():
    """Copies weights for three checkpoints, reads each copy and changes the weights meanwhile."""
    weight, host_copy = torch.zeros(16, device="cuda"), HostCopy()
    for _ in range(3):
        weight += 1
        copied = host_copy.of({"weight": weight, "transposed": weight.view(4, 4).T})
        weight *= 2
        copied["weight"].numpy()


def races(run, safeguard=None):
    """The races of a run; without a safeguard, which is replaced by nothing."""
    RECORD.races.clear()
    with safeguard or contextlib.nullcontext():
        run()
        gc.collect()
    torch.cuda.synchronize()
    return list(RECORD.races)


def wait_stream_only_of(is_kept):
    """`wait_stream` that does nothing on the other streams."""
    wait_stream = Stream.wait_stream
    return mock.patch.object(
        Stream, "wait_stream", lambda self, other: wait_stream(self, other) if is_kept(self) else None
    )


def main():
    try:
        install()
    except Unsupported as error:
        sys.exit(f"unsupported: {error}")
    found = {
        "prefetcher": races(prefetch),
        "saver": races(save),
        "prefetcher: the step does not wait for the copy": races(
            prefetch, wait_stream_only_of(lambda stream: stream is not DEFAULT)
        ),
        "prefetcher: the copy does not wait for the model": races(
            prefetch, wait_stream_only_of(lambda stream: stream is DEFAULT)
        ),
        "prefetcher: no record_stream": races(
            prefetch, mock.patch.object(GpuTensor, "record_stream", lambda self, stream: None)
        ),
        "saver: no synchronize": races(save, mock.patch.object(Stream, "synchronize", lambda self: None)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
