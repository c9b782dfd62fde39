"""`install`: PyTorch with a pretended GPU, for the whole process."""

import atexit
import collections
import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

from pretended_gpu import streams, tensors
from pretended_gpu.streams import DEFAULT, RECORD
from pretended_gpu.tensors import EveryOperation, Generator, GpuTensor

PRIVATE = ("_jit_override_can_fuse_on_gpu", "_jit_set_texpr_fuser_enabled", "_jit_set_profiling_executor")
PRIVATE += ("_ensureCUDADeviceGuardSet", "_set_only_lift_cpu_tensors", "_set_multithreading_enabled")
Properties = collections.namedtuple("Properties", "name major minor total_memory multi_processor_count gcnArchName")
PROPERTIES = Properties("pretended GPU", 9, 0, 80 << 30, 132, "")


class Unsupported(Exception):
    """This version of PyTorch cannot have a pretended GPU. The message names the missing part."""


def install(devices=1):
    """Gives this process a pretended GPU: from here on, and in this thread.

    Args:
        devices: how many GPUs `torch.cuda.device_count` returns. This process has that of its `LOCAL_RANK`.

    Raises:
        Unsupported: a private function of PyTorch is missing.
    """
    missing = [name for name in PRIVATE if not hasattr(torch._C, name)]
    if missing:
        raise Unsupported(f"torch {torch.__version__} lacks torch._C.{', '.join(missing)}")
    # TorchScript would compile kernels for the device
    torch._C._jit_override_can_fuse_on_gpu(False)
    torch._C._jit_set_texpr_fuser_enabled(False)
    torch._C._jit_set_profiling_executor(False)
    _answer_that_no_device_has_a_context()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is a copy, which dispatch sees
    torch._C._set_multithreading_enabled(False)  # the backward pass in this thread, whose operations dispatch sees
    torch.backends.cudnn.enabled = False
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.to` cannot exchange the data of a wrapper
    for name, value in _cuda(devices).items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name, value in _accelerator(devices).items():
        setattr(torch.accelerator, name, value)
    torch.Stream, torch.Generator = streams.Stream, _DeviceGenerator
    _pin_and_watch_host_memory()
    _let_optimizers_fuse()
    EveryOperation().__enter__()


def _cuda(devices):
    """The functions and classes of `torch.cuda` that the pretended GPU replaces."""

    current = {"index": 0}

    def set_device(device):
        current["index"] = device if isinstance(device, int) else torch.device(device).index or 0

    def set_sync_debug_mode(mode):
        RECORD.sync_debug_mode = {0: "default", 1: "warn", 2: "error"}.get(mode, mode)

    def reset_peak(device=None):
        RECORD.peak = RECORD.allocated

    def is_this_process():
        return os.getpid() == tensors.PROCESS

    return {
        "is_available": lambda: True,
        "is_initialized": is_this_process,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: not is_this_process(),
        "device_count": lambda: devices,
        "current_device": lambda: current["index"],
        "set_device": set_device,
        "device": _DeviceContext,
        "device_of": _DeviceContext,
        "_DeviceGuard": _DeviceContext,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "StreamContext": streams.StreamContext,
        "stream": streams.StreamContext,
        "current_stream": streams.current_stream,
        "set_stream": streams.set_stream,
        "default_stream": lambda device=None: DEFAULT,
        "synchronize": streams.synchronize,
        "is_current_stream_capturing": lambda: False,
        "_sleep": lambda cycles: None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: RECORD.sync_debug_mode,
        "get_rng_state": Generator.get_state,
        "set_rng_state": Generator.set_state,
        "get_rng_state_all": lambda: [Generator.get_state()],
        "set_rng_state_all": lambda states: Generator.set_state(states[0]),
        "manual_seed": Generator.seed,
        "manual_seed_all": Generator.seed,
        "memory_allocated": lambda device=None: RECORD.allocated,
        "memory_reserved": lambda device=None: RECORD.allocated,
        "max_memory_allocated": lambda device=None: RECORD.peak,
        "max_memory_reserved": lambda device=None: RECORD.peak,
        "reset_peak_memory_stats": reset_peak,
        "reset_max_memory_allocated": reset_peak,
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "mem_get_info": lambda device=None: (40 << 30, PROPERTIES.total_memory),
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": lambda *_: None,
    }


class _DeviceContext(contextlib.AbstractContextManager):
    def __init__(self, device=None):
        pass

    def __exit__(self, *_):
        return None


_HOST_GENERATOR = torch.Generator


class _AnyGenerator(type(_HOST_GENERATOR)):  # torch 2.15's has a metaclass
    def __instancecheck__(cls, value):
        return isinstance(value, _HOST_GENERATOR)


class _DeviceGenerator(_HOST_GENERATOR, metaclass=_AnyGenerator):
    """Replaces `torch.Generator`: on any device it draws the host's numbers."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        pass


def _accelerator(devices):
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: devices,
        "current_device_index": lambda: torch.cuda.current_device(),
        "current_device_idx": lambda: torch.cuda.current_device(),
        "set_device_index": lambda device: None,
        "set_device_idx": lambda device: None,
        "current_stream": streams.current_stream,
        "synchronize": streams.synchronize,
    }


def _pin_and_watch_host_memory():
    numpy = torch.Tensor.numpy

    def pin_memory(self, device=None):
        if tensors.is_pinned(self):
            return self
        with torch.utils._mode_utils.no_dispatch():
            copied = torch.empty_strided(self.size(), self.stride(), dtype=self.dtype).copy_(self)
        return tensors.pin(copied)

    def watched_numpy(self, *args, **kwargs):
        tensors.host_accesses(self, writes=False)
        return numpy(self, *args, **kwargs)

    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: tensors.is_pinned(self)
    torch.Tensor.numpy = watched_numpy


def _let_optimizers_fuse():
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    for module in (optimizer, _foreach_utils):
        known = getattr(module, "_foreach_supported_types", None)
        if known is not None and GpuTensor not in known:
            known.append(GpuTensor)


def _answer_that_no_device_has_a_context():
    """The backward pass asks CUDA's hooks whether the device has a context. Without a driver that raises an error.

    A copy of the hooks' table of virtual functions answers no. Then the backward pass asks for no stream of CUDA's.
    """
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(folder / "libtorch_cpu.so"))
        get_hooks = library._ZN2at6detail12getCUDAHooksEv
    except (OSError, AttributeError) as error:
        raise Unsupported(f"torch {torch.__version__} hides CUDA's hooks: {error}") from error
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks())
    before, count, slot = 2, 100, 4  # after two destructors, isBuilt and isAvailable
    size = ctypes.sizeof(ctypes.c_void_p)
    copied = (ctypes.c_void_p * (before + count))()
    ctypes.memmove(copied, table.value - before * size, (before + count) * size)
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, device: False)
    copied[before + slot] = ctypes.cast(no, ctypes.c_void_p).value
    original, table.value = table.value, ctypes.addressof(copied) + before * size
    _KEPT.extend((copied, no, library))
    atexit.register(lambda: setattr(table, "value", original))


_KEPT: list = []  # what C++ has addresses of


if __name__ == "__main__":  # the smallest case, for versions of PyTorch that nobody has tried
    try:
        install()
    except Unsupported as error:
        sys.exit(f"unsupported: {error}")
    model = torch.nn.Conv2d(2, 2, 1).to("cuda")
    with torch.autocast("cuda", torch.float16):
        model(torch.ones(1, 2, 3, 3, device="cuda")).sum().backward()
    assert model.weight.grad.is_cuda
