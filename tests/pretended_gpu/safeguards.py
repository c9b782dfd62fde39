"""A program: prints what the pretended GPU finds without each safeguard of the product.

    cd tests; python -m pretended_gpu.safeguards

It prints JSON: `races` of the prefetcher and the saver, with all safeguards and without each; `refused`, the errors for
collectives that break NCCL's rules.
"""

import contextlib
import gc
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

from pretended_gpu.cuda import Unsupported, install
from pretended_gpu.nccl import install_nccl
from pretended_gpu.streams import DEFAULT, RECORD, Stream
from pretended_gpu.tensors import GpuTensor
from shared.data.loading import Batch, PrefetchLoader
from shared.training.saving import HostCopy


def prefetch():
    """Trains on five batches, which another stream copies and prepares."""
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
    """The races of a run, optionally without a safeguard."""
    RECORD.races.clear()
    with safeguard or contextlib.nullcontext():
        run()
        gc.collect()
    torch.cuda.synchronize()
    return list(RECORD.races)


def without(target, name, is_kept=lambda owner: False):
    """Replaces a method by a no-op, except for owners that `is_kept` accepts."""
    method = getattr(target, name)

    def kept_or_nothing(self, *arguments):
        return method(self, *arguments) if is_kept(self) else None

    return mock.patch.object(target, name, kept_or_nothing)


def refused_collectives():
    """The errors of the collectives that NCCL refuses."""
    install_nccl()
    start = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    errors = {"no device": error_of(lambda: dist.init_process_group("nccl", **start))}
    torch.cuda.set_device(0)
    errors["gloo"] = error_of(lambda: dist.init_process_group("gloo", **start))
    dist.init_process_group("nccl", **start)
    matrix = torch.ones(2, 3, device="cuda")
    errors["of the host"] = error_of(lambda: dist.broadcast(matrix.cpu(), 0))
    errors["not contiguous"] = error_of(lambda: dist.all_reduce(matrix.T))
    errors["int16"] = error_of(lambda: dist.all_reduce(matrix.short()))
    errors["allowed"] = error_of(lambda: dist.all_reduce(matrix))
    return errors


def error_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def main():
    try:
        install()
    except Unsupported as error:
        sys.exit(f"unsupported: {error}")
    found = {
        "prefetcher": races(prefetch),
        "saver": races(save),
        "prefetcher: the step does not wait for the copy": races(
            prefetch, without(Stream, "wait_stream", lambda stream: stream is not DEFAULT)
        ),
        "prefetcher: the copy does not wait for the model": races(
            prefetch, without(Stream, "wait_stream", lambda stream: stream is DEFAULT)
        ),
        "prefetcher: no record_stream": races(prefetch, without(GpuTensor, "record_stream")),
        "saver: no synchronize": races(save, without(Stream, "synchronize")),
    }
    print(json.dumps({"races": found, "refused": refused_collectives()}))


if __name__ == "__main__":
    main()
