"""A pretended GPU: tensors that claim to be on `cuda:0` and compute on the CPU.

`install()` patches the process that calls it, so tests run it in a process of their own. The product's code then takes
its GPU branches. Numbers are the CPU's. The pretended GPU raises an error where CUDA would, and records the rest:

- waits: each operation that makes the host wait for the device, with its stack;
- races: reads and writes that no stream, event or wait puts in order;
- unpinned: `non_blocking` copies from memory that is not pinned;
- mixed: operations that accept numbers of both devices, and are slow or wait for it.

It cannot show speed, kernels, or memory in bytes.

    streams.py   the order of reads and writes: streams, events, memory, the record
    tensors.py   the tensor, and what each operation does to the record
    cuda.py      `install`: the patched parts of PyTorch
    nccl.py      NCCL's rules over Gloo
    train.py     a program: trains cases on the CPU and on the pretended GPU, and prints what happened as JSON
    safeguards.py  a program: takes away each safeguard of the product's copies in turn
    plugin.py    a plugin of pytest: runs tests/gpu on the pretended GPU
"""
