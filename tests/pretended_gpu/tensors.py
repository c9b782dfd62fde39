"""The tensor of the pretended GPU, and what each operation on one does."""

import copy
import os

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_gpu.streams import GPU, RECORD, Block, PinnedCopy, current_stream, host_waits

CPU = torch.device("cpu")
PROCESS = os.getpid()
# those whose result has a size that only the device knows, or that check their result
WAITING = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal"),
    *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::histc"),
    *("aten::unique_dim_consecutive", "aten::linalg_inv_ex", "aten::_linalg_solve_ex", "aten::_linalg_svd"),
    "torchvision::nms",
}
INDEX_PUT = ("aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
# a tensor of the host without dimensions may stand beside the device's, as in all pointwise operations
ACCEPT_HOST_NUMBERS = ("aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::where", *INDEX_PUT)
MASKS = (torch.bool, torch.uint8)


class GpuTensor(torch.Tensor):
    """Claims to be on the GPU; `on_host` has its values and `block` is its memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host, requires_grad=False):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            layout=on_host.layout,
            device=GPU,
            requires_grad=requires_grad,
        )
        self.on_host = on_host
        storage = on_host.untyped_storage()
        if not hasattr(storage, "block"):
            storage.block = Block(storage.nbytes())
        self.block = storage.block
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def access(self, writes):
        self.block.access(current_stream(), writes)

    # --- what PyTorch does in C++ without asking __torch_dispatch__ ---------------------------------------

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self):
        current_stream().enqueue()
        self.access(writes=False)
        host_waits("tolist")
        return self.on_host.tolist()

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        if not isinstance(value, GpuTensor):
            raise RuntimeError("pretended GPU: the data of a tensor on the device cannot become one of the host")
        torch.Tensor.data.__set__(self, value)
        self.on_host, self.block = value.on_host, value.block

    def set_(self, source, *args):
        storage = source.on_host if isinstance(source, (GpuStorage, GpuTensor)) else source
        return GpuTensor(torch.empty(0, dtype=self.dtype).set_(storage, *args))

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = torch.tensor(_as_numbers(data), dtype=dtype or self.dtype)
        return made.to(GPU if device is None else device).requires_grad_(requires_grad)

    def __getitem__(self, index):
        return super().__getitem__(tuple(map(_on_gpu, index)) if isinstance(index, tuple) else _on_gpu(index))

    def record_stream(self, stream):
        self.block.recorded.add(stream)

    def pin_memory(self, device=None):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def untyped_storage(self):
        return GpuStorage(self.on_host.untyped_storage())

    def data_ptr(self):
        return self.on_host.data_ptr()

    def __repr__(self):
        return f"on the pretended GPU: {self.on_host!r}"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol):
        host_waits("pickling")
        return GpuTensor, (self.on_host.clone(), self.requires_grad)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol at the moment"
            )
        stream, storage = current_stream(), self.on_host.untyped_storage()
        stream.enqueue()
        self.access(writes=False)
        copied = memo.setdefault(("storage", storage._cdata), storage.clone())
        layout = self.on_host.storage_offset(), self.on_host.size(), self.on_host.stride()
        made = _made(torch.empty(0, dtype=self.dtype).set_(copied, *layout), stream)
        memo[id(self)] = made.requires_grad_(self.requires_grad)
        for name, value in self.__dict__.items():
            if name not in ("on_host", "block"):
                setattr(made, name, copy.deepcopy(value, memo))
        made.grad = copy.deepcopy(self.grad, memo)
        return made


class GpuStorage:
    """Replaces the storage of a tensor on the device."""

    device, is_cuda = GPU, True

    def __init__(self, on_host):
        self.on_host = on_host

    def __getattr__(self, name):  # data_ptr, nbytes, size and the like
        return getattr(self.on_host, name)

    def __len__(self):
        return len(self.on_host)


class EveryOperation(TorchDispatchMode):
    """Also sees operations that make device tensors from nothing, and the host's reads of pinned memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def _as_numbers(data):
    if isinstance(data, torch.Tensor):
        return data.tolist()  # CUDA waits for each
    return [_as_numbers(each) for each in data] if isinstance(data, (list, tuple)) else data


def _on_gpu(index):
    """An index; a list becomes a tensor on the device, which CUDA copies while the host waits."""
    if isinstance(index, (list, range)) and not any(isinstance(each, torch.Tensor) for each in index):
        return torch.tensor(list(index)).to(GPU)
    return index


# --- the host's memory --------------------------------------------------------------------------------------


def is_pinned(tensor):
    return tensor.layout is torch.strided and hasattr(tensor.untyped_storage(), "pinned")


def pin(tensor):
    tensor.untyped_storage().pinned = True
    return tensor


def host_accesses(tensor, writes):
    if is_pinned(tensor) and (pending := getattr(tensor.untyped_storage(), "pending", None)):
        pending.host_accesses(writes)


# --- operations ---------------------------------------------------------------------------------------------


class Facts:
    """What an operation's schema says.

    Attributes:
        written: names of the arguments that it writes.
        returned: for each result, the position of the argument that it is; None for a new tensor.
    """

    def __init__(self, func):
        schema = func._schema
        self.name = schema.name
        self.arguments = [argument.name for argument in schema.arguments]
        aliases = [argument.alias_info for argument in schema.arguments]
        written = [alias.before_set if alias and alias.is_write else set() for alias in aliases]
        self.written = {name for name, names in zip(self.arguments, written, strict=True) if names}
        self.returned = []
        for result in schema.returns:
            names = result.alias_info.before_set if result.alias_info and result.alias_info.is_write else set()
            self.returned.append(next((i for i, each in enumerate(written) if each & names), None))
        self.of_lists = "_foreach_" in self.name
        self.changes_view = torch.Tag.inplace_view in func.tags
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        self.is_pointwise = torch.Tag.pointwise in func.tags

    @classmethod
    def of(cls, func):
        if func not in cls.known:
            cls.known[func] = cls(func)
        return cls.known[func]

    known: dict = {}  # noqa: RUF012 as long as the process


def tensors_of(facts, args, kwargs):
    """(the argument's name, the tensor) of each tensor in the arguments."""
    named = [*zip(facts.arguments, args, strict=False), *kwargs.items()]
    return [(name, tensor) for name, value in named for tensor in _tensors_in(value)]


def _tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors_in(each)]
    return []


def on_host(value):
    if isinstance(value, GpuTensor):
        return value.on_host
    return type(value)(map(on_host, value)) if type(value) in (list, tuple) else value


def collective(func, name, tensors, args, kwargs):
    """An operation of torch.distributed; nccl.py replaces this."""
    return func(*args, **kwargs)


def dispatch(func, args, kwargs):
    facts = Facts.of(func)
    tensors = tensors_of(facts, args, kwargs)
    if facts.name.startswith("c10d::"):
        return collective(func, facts.name, tensors, args, kwargs)
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if device == "cuda":
        _check_index(kwargs["device"])
    if device != "cuda" and not any(isinstance(tensor, GpuTensor) for _, tensor in tensors):
        return _on_host_alone(func, facts, tensors, args, kwargs)
    if os.getpid() != PROCESS:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    RECORD.operations += 1
    stream = current_stream()
    stream.enqueue()
    if facts.name == "aten::_to_copy":
        return _to_copy(func, stream, *args, **kwargs)
    if facts.name == "aten::copy_" and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor):
        return _copy_between_devices(stream, *args, **kwargs)
    _check_devices(facts, tensors, args)
    _note_waits(facts, args, kwargs)
    for name, tensor in tensors:
        if isinstance(tensor, GpuTensor):
            tensor.access(writes=name in facts.written)
    if facts.changes_view:
        return _change_view(func, facts.name, args, kwargs)
    given = {name: on_host(value) for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    if device is not None:
        given["device"] = CPU
    compute = _as_cuda_computes(facts.name, func)
    results = _random(compute, args, given) if facts.is_random else compute(*map(on_host, args), **given)
    if not facts.returned or device == "cpu":
        return results

    def result(value, position):
        if position is not None:
            return args[position] if position < len(args) else kwargs[facts.arguments[position]]
        return _made(value, stream)

    if len(facts.returned) == 1:
        return result(results, facts.returned[0])
    return tuple(map(result, results, facts.returned))


def _check_index(device):
    """Raises an error if a process uses another process's GPU."""
    index = torch.device(device).index
    if (torch.cuda.current_device() if index is None else index) != GPU.index:
        raise RuntimeError(f"pretended GPU: a tensor on {device} in a process whose device is {GPU}")


def _made(value, stream):
    """Device tensors for the results of an operation on `stream`."""
    if isinstance(value, (list, tuple)):
        return [_made(each, stream) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    made = GpuTensor(value)
    if made.block.writer is None:
        made.block.writer = (stream, stream.count)
    return made


def _on_host_alone(func, facts, tensors, args, kwargs):
    for name, tensor in tensors:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            host_accesses(tensor, name in facts.written)
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    return pin(func(*args, **{**kwargs, "pin_memory": False}))


def _to_copy(func, stream, source, device=None, non_blocking=False, pin_memory=None, **given):
    if not isinstance(source, GpuTensor):
        _send(source, stream, non_blocking)
        return _made(func(source, **given), stream)
    source.access(writes=False)
    copied = func(source.on_host, **given)
    if device is None or torch.device(device).type == "cuda":
        return _made(copied, stream)
    if copied.data_ptr() == source.on_host.data_ptr():
        copied = copied.clone()
    if non_blocking:  # PyTorch allocates pinned memory for it
        pin(copied).untyped_storage().pending = PinnedCopy(stream, to_host=True)
    else:
        host_waits("copy to the host")
    return copied


def _copy_between_devices(stream, target, source, non_blocking=False):
    if isinstance(target, GpuTensor):
        _send(source, stream, non_blocking)
        target.access(writes=True)
        target.on_host.copy_(source)
        return target
    source.access(writes=False)
    host_accesses(target, writes=True)
    target.copy_(source.on_host)
    if non_blocking and is_pinned(target):
        target.untyped_storage().pending = PinnedCopy(stream, to_host=True)
    else:
        if non_blocking:
            RECORD.odd(RECORD.unpinned, "to the host")
        host_waits("copy to the host")
    return target


def _send(source, stream, non_blocking):
    host_accesses(source, writes=False)
    if non_blocking and is_pinned(source):
        source.untyped_storage().pending = PinnedCopy(stream, to_host=False)
    elif non_blocking:
        RECORD.odd(RECORD.unpinned, "to the device")
    else:
        host_waits("copy to the device")


def _check_devices(facts, tensors, args):
    """Raises CUDA's error if an operation gets tensors of both devices."""
    if facts.name == "aten::index" and not isinstance(args[0], GpuTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    for name, tensor in tensors:
        if isinstance(tensor, GpuTensor):
            continue
        if name == "indices" and facts.name in ("aten::index", *INDEX_PUT):
            host_waits("copy of an index to the device")
        elif tensor.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({facts.name}: {name} {tuple(tensor.shape)})"
            )
        elif facts.of_lists or not (facts.is_pointwise or facts.name in ACCEPT_HOST_NUMBERS):
            RECORD.odd(RECORD.mixed, f"{facts.name}: {name} is a number of the host")


def _note_waits(facts, args, kwargs):
    name = facts.name
    is_masked = name in ("aten::index", *INDEX_PUT) and any(
        index is not None and index.dtype in MASKS for index in args[1]
    )
    if is_masked and name in INDEX_PUT:  # one number for all that the mask covers needs no sizes
        accumulates = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
        is_masked = args[2].numel() != 1 or accumulates or sum(index is not None for index in args[1]) > 1
    if is_masked:
        host_waits(f"{name} with a mask")
    elif name in WAITING or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        host_waits(name)


def _change_view(func, name, args, kwargs):
    target = args[0]
    func(*map(on_host, args), **kwargs)
    with no_dispatch():
        if name in ("aten::resize_", "aten::set_"):
            inner = target.on_host
            target.as_strided_(inner.size(), inner.stride(), inner.storage_offset())
        else:
            func(*args, **kwargs)
    return target


def _as_cuda_computes(name, func):
    """The operation. CUDA's softmax kernel takes half precision and gives float32; the CPU's does not."""
    if name in ("aten::_softmax", "aten::_log_softmax"):
        return lambda given, dim, to_float: func(given.float() if to_float else given, dim, False)
    if name in ("aten::_softmax_backward_data", "aten::_log_softmax_backward_data"):
        return lambda grad, output, dim, dtype: func(grad, output, dim, grad.dtype).to(dtype)
    return func


class Generator:
    """The device's random number generator: the CPU's algorithm with its own state."""

    state = torch.Generator().manual_seed(0).get_state()

    @classmethod
    def get_state(cls, device=None):
        return cls.state.clone()

    @classmethod
    def set_state(cls, state, device=None):
        if isinstance(state, GpuTensor):
            raise TypeError("RNG state must be a torch.ByteTensor")
        cls.state = state.clone()

    @classmethod
    def seed(cls, seed):
        cls.state = torch.Generator().manual_seed(int(seed)).get_state()


def _random(compute, args, kwargs):
    generator = torch.default_generator
    kept = generator.get_state()
    generator.set_state(Generator.state)
    try:
        return compute(*map(on_host, args), **kwargs)
    finally:
        Generator.state = generator.get_state()
        generator.set_state(kept)
