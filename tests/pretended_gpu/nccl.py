"""A program: trains on two processes with a pretended GPU each, over Gloo, by NCCL's rules.

    cd tests; python -m torch.distributed.run --standalone --nproc-per-node 2 -m pretended_gpu.nccl SHAPES FOLDER CASE

A collective raises an error where NCCL would: for a tensor of the host, for one that is not contiguous, for a type that
NCCL lacks, and before the process has chosen its device. Rank 0 writes FOLDER/results.json: `reports`, the lines of
metrics.jsonl, `collectives`, how often each was called, and `races`.
"""

import collections
import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pretended_gpu import tensors
from pretended_gpu.cuda import Unsupported, install
from pretended_gpu.streams import RECORD, current_stream, host_waits
from pretended_gpu.tensors import GpuTensor, on_host

WITHOUT = (torch.int16, torch.complex64, torch.complex128)
CALLS = collections.Counter()


def collective(func, name, given, args, kwargs):
    """A collective with NCCL's rules, through Gloo."""
    if name == "c10d::allreduce_" and dist.ProcessGroup.unbox(args[1]).group_name != dist.group.WORLD.group_name:
        return func(*args, **kwargs)  # the group of Gloo beside NCCL's
    CALLS[name] += 1
    current_stream().enqueue()
    for _, tensor in given:
        if not isinstance(tensor, GpuTensor):
            raise RuntimeError(f"{name}: No backend type associated with device type cpu")
        if not tensor.is_contiguous():
            raise RuntimeError(f"{name}: Tensors must be contiguous: {tuple(tensor.shape)}")
        if tensor.dtype in WITHOUT:
            raise RuntimeError(f"{name}: Unconvertible NCCL type {tensor.dtype}")
        tensor.access(writes=True)
    if name == "c10d::barrier":
        host_waits(name)
    return func(*map(on_host, args), **{key: on_host(value) for key, value in kwargs.items()})


def install_nccl():
    """From here on, `init_process_group("nccl")` starts Gloo with NCCL's rules."""
    start = dist.init_process_group
    has_device, starts = [], []
    set_device = torch.cuda.set_device

    def note_device(device):
        has_device.append(device)
        set_device(device)

    def init_process_group(backend=None, *args, **kwargs):
        if backend != "nccl":
            raise RuntimeError(f"processes with GPUs must use nccl, not {backend}")
        if not has_device:
            raise RuntimeError("no process has chosen its device: NCCL would put all of them on the first")
        if "RANK" in os.environ:  # a second start in one process must not read the addresses of the first
            store, rank, size = next(dist.rendezvous("env://"))
            starts.append(rank)
            kwargs |= {"store": dist.PrefixStore(f"start {len(starts)}", store), "rank": rank, "world_size": size}
        return start("gloo", *args, **kwargs)

    torch.cuda.set_device = note_device
    tensors.collective = collective
    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
    dist.get_backend = lambda group=None: "nccl"
    dist.distributed_c10d._get_object_coll_device = lambda group=None: "cuda"


class PlainDDP(nn.Module):
    """Replaces DDP, whose reducer needs CUDA's events in C++: the same collectives, one tensor at a time."""

    def __init__(self, module, **_):
        super().__init__()
        self.module, self.synchronizes = module, True
        self._broadcast(module.state_dict().values())
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._reduce)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def _reduce(self, parameter):
        if self.synchronizes:
            bucket = parameter.grad.flatten()
            dist.all_reduce(bucket)
            parameter.grad.copy_(bucket.view_as(parameter.grad) / dist.get_world_size())

    @staticmethod
    def _broadcast(values):
        for value in values:
            bucket = value.flatten().clone()
            dist.broadcast(bucket, 0)
            value.copy_(bucket.view_as(value))

    @contextlib.contextmanager
    def no_sync(self):
        self.synchronizes = False
        yield
        self.synchronizes = True

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            self._broadcast(self.module.buffers())
        return self.module(*args, **kwargs)


def main():
    from determined.pytorch import PyTorchTrialContext

    from pretended_gpu.train import Waits, train, trial_class_of, watched, without_figures

    shapes, folder, name = sys.argv[1:]
    shapes, folder = Path(shapes).absolute(), Path(folder).absolute()
    os.chdir(folder)
    without_figures()
    trial_class = watched(trial_class_of(name), Waits())
    try:
        install(devices=2)
    except Unsupported as error:
        sys.exit(f"unsupported: {error}")
    install_nccl()
    PyTorchTrialContext._PyTorchDistributedDataParallel = PlainDDP
    rank = os.environ["RANK"]
    reports = train(trial_class, name, shapes, folder / "run", config_file=folder / f"rank{rank}.yaml")
    if rank == "0":
        found = {"reports": reports, "collectives": CALLS, "races": list(RECORD.races)}
        (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
