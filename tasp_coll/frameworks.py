"""How arrays of each kind are read and made; `arrays` recognises the kind and is what the other modules use.

Almost every kind is reached through a NumPy view of its memory (`Plain`, `HeldKind`); torch has types that
NumPy lacks and is read directly (`Torch`). NumPy is the only array library imported here: a caller's array
proves that its own is loaded.
"""

from __future__ import annotations

import array as stdarray
import ctypes
import functools
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import ArgumentTypeError

NDArray = np.ndarray[Any, Any]
Shape = tuple[int, ...]
_ALIGNMENT = 64  # bytes; XLA adopts host memory without a copy only at this alignment


class Buffer(NamedTuple):
    """The memory of one array. Made on every call, where a frozen dataclass would take 4 times as long."""

    address: int  # may be 0 where nbytes is 0
    nbytes: int  # shape times itemsize, also for a strided array
    shape: Shape
    dtype: str  # canonical name, the same for all kinds of array
    itemsize: int
    contiguous: bool  # C-contiguous
    readonly: bool
    kind: str
    owner: Any  # keeps the memory alive; results are made from it
    device: int | None = None  # number of the GPU; None is host memory


class DeviceBytes(NamedTuple):
    """Memory of a GPU, as NumPy's uint8 arrays are of the host. owner: keeps it alive."""

    address: int
    nbytes: int
    owner: Any


class _CudaArray:
    """Such memory as frameworks take it in."""

    def __init__(self, memory: DeviceBytes) -> None:
        self.owner = memory.owner
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 3,
        }


class Held(NamedTuple):
    """The owner where NumPy's view is not what the caller handed in."""

    host: NDArray
    source: Any  # what results need: the caller's object, or its device


class Kind(Protocol):
    """What a kind of array can do; `arrays` documents each method."""

    def strides(self, buffer: Buffer) -> Shape: ...
    def packed(self, buffer: Buffer) -> Buffer: ...
    def new(self, like: Buffer, shape: Shape) -> Buffer: ...
    def result(self, buffer: Buffer) -> Any: ...
    def view(self, like: Buffer, memory: Any, offset: int, shape: Shape, readonly: bool) -> Any: ...
    def crosses(self, buffer: Buffer, stream: int) -> bool: ...
    def follows(self) -> bool: ...


def type_error(name: str, came: object, rule: str) -> ArgumentTypeError:
    """The error for an argument of the wrong kind: its name, the rule and the type that came."""
    module = type(came).__module__
    label = type(came).__qualname__ if module == "builtins" else f"{module}.{type(came).__qualname__}"
    return ArgumentTypeError(f"{name} {rule}; got {label}")


@functools.lru_cache(maxsize=512)
def numpy_dtype_name(dtype: np.dtype[Any]) -> str:
    """Canonical name of a dtype: NumPy's name, or its type string or fields where the name says too little or
    hides the byte order. Empty for elements that are references (object, StringDType) or have no bytes."""
    if dtype.hasobject or dtype.itemsize == 0:
        return ""
    if dtype.names is not None:
        return str(np.dtype((np.void, dtype)))
    if not dtype.isnative or dtype.type in (np.void, np.bytes_, np.str_):
        return dtype.str
    return dtype.name


@functools.lru_cache(maxsize=128)
def torch_dtype_name(dtype: Any) -> str:
    """Canonical name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def buffer_of(host: NDArray, owner: Any, kind: str, name: str) -> Buffer:
    """Describe memory that NumPy sees as `host`. Hot: ctypes finds the address 3 times as fast as NumPy."""
    dtype = numpy_dtype_name(host.dtype)
    if not dtype:
        raise ArgumentTypeError(
            f"{name} must have elements of plain bytes, which can travel; got dtype {host.dtype!r} ({kind})"
        )
    try:
        address = ctypes.addressof(ctypes.c_char.from_buffer(host))  # type: ignore[arg-type]
    except (
        TypeError,
        ValueError,
        BufferError,
    ):  # read-only, strided, empty, or a dtype without format letter
        address = host.ctypes.data
    flags = host.flags
    contiguous, readonly = flags.c_contiguous, not flags.writeable
    return Buffer(address, host.nbytes, host.shape, dtype, host.itemsize, contiguous, readonly, kind, owner)


def _aligned(shape: Shape, dtype: np.dtype[Any]) -> NDArray:
    memory = np.empty(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % _ALIGNMENT)


class Plain:
    """NumPy arrays; the owner is the array. Other kinds override how an owner holds its NumPy view."""

    def host(self, owner: Any) -> NDArray:
        array: NDArray = owner
        return array

    def own(self, host: NDArray, like: Any) -> Any:
        """An owner for `host`, memory of ours, of the same kind as the owner `like`."""
        return host

    def allocate(self, shape: Shape, dtype: np.dtype[Any]) -> NDArray:
        return np.empty(shape, dtype)

    def strides(self, buffer: Buffer) -> Shape:
        return self.host(buffer.owner).strides

    def packed(self, buffer: Buffer) -> Buffer:
        copy = np.array(self.host(buffer.owner), order="C")
        return buffer_of(copy, self.own(copy, buffer.owner), buffer.kind, "")

    def new(self, like: Buffer, shape: Shape) -> Buffer:
        fresh = self.allocate(shape, self.host(like.owner).dtype)
        return buffer_of(fresh, self.own(fresh, like.owner), like.kind, "")

    def result(self, buffer: Buffer) -> Any:
        return self.host(buffer.owner)

    def crosses(self, buffer: Buffer, stream: int) -> bool:
        return False

    def follows(self) -> bool:
        return False

    def view(self, like: Buffer, memory: NDArray, offset: int, shape: Shape, readonly: bool) -> Any:
        array: NDArray = np.ndarray(shape, self.host(like.owner).dtype, memory, offset)
        if readonly:
            array.flags.writeable = False
        return array


class HeldKind(Plain):
    """Exporters of the buffer protocol and of `__array_interface__`: results are NumPy arrays."""

    def host(self, owner: Held) -> NDArray:
        return owner.host

    def own(self, host: NDArray, like: Held) -> Held:
        return Held(host, like.source)


class Flat(HeldKind):
    """array.array, bytearray and bytes: one-dimensional objects, so a result of any shape comes back flat."""

    def new(self, like: Buffer, shape: Shape) -> Buffer:
        source, count = like.owner.source, math.prod(shape)
        fresh: Any
        if isinstance(source, stdarray.array):
            fresh = stdarray.array(source.typecode, bytes(like.itemsize)) * count
        else:
            fresh = bytearray(count)
        host = np.asarray(memoryview(fresh)).reshape(shape)
        return buffer_of(host, Held(host, fresh), like.kind, "")

    def result(self, buffer: Buffer) -> Any:
        return buffer.owner.source


class Dlpack(HeldKind):
    """Anything with DLPack: results go home through `from_dlpack` of the array's namespace, if it has one."""

    def result(self, buffer: Buffer) -> Any:
        return self._home(buffer.owner.host, buffer.owner.source)

    def view(self, like: Buffer, memory: NDArray, offset: int, shape: Shape, readonly: bool) -> Any:
        array = super().view(like, memory, offset, shape, False)
        # Many consumers refuse or ignore DLPack's read-only flag.
        return self._home(array.copy() if readonly or not array.flags.writeable else array, like.owner.source)

    @staticmethod
    def _home(host: NDArray, source: Any) -> Any:
        namespace = source.__array_namespace__() if hasattr(source, "__array_namespace__") else None
        from_dlpack = getattr(namespace, "from_dlpack", None)
        return host if from_dlpack is None else from_dlpack(host)


def jax_types(dtype: np.dtype[Any]) -> AbstractContextManager[Any]:
    """Where JAX makes arrays of a dtype. The caller's was made with 64-bit types enabled; they need not be here."""
    if dtype not in (np.int64, np.uint64, np.float64, np.complex128):
        return nullcontext()
    jax = sys.modules["jax"]
    found: AbstractContextManager[Any] = (
        jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    )(True)
    return found


class Jax(HeldKind):
    """jax.Array on one CPU device, the owner's source. XLA adopts aligned memory, of bfloat16 and fp8 too."""

    def describe(self, array: Any, name: str) -> Buffer:
        if isinstance(array, sys.modules["jax"].core.Tracer):
            raise type_error(name, array, "must be concrete, not traced: call outside of jit, grad and vmap")
        if array.is_deleted():
            raise type_error(name, array, "must still have its memory: it was deleted or donated")
        devices = array.devices()
        if len(devices) != 1:
            rule = f"must be on one device, not on {len(devices)}: pass {name}.addressable_shards[i].data"
            raise type_error(name, array, rule)
        (device,) = devices
        if device.platform != "cpu":
            rule = (
                f"must be in host memory or on a GPU, not {device}: pass jax.device_put({name}, jax.devices('cpu')[0])"
            )
            raise type_error(name, array, rule)
        try:
            host = np.asarray(array)  # waits for the values; a view of XLA's memory
        except (TypeError, RuntimeError) as error:  # a key of jax.random, another process's array
            raise type_error(name, array, f"must be readable by NumPy ({error})") from error
        # XLA may share this memory between arrays, whatever NumPy says.
        return buffer_of(host, Held(host, device), "jax", name)._replace(readonly=True)

    def allocate(self, shape: Shape, dtype: np.dtype[Any]) -> NDArray:
        return _aligned(shape, dtype)

    def result(self, buffer: Buffer) -> Any:
        return self._put(buffer.owner.host, buffer.owner.source)

    def view(self, like: Buffer, memory: NDArray, offset: int, shape: Shape, readonly: bool) -> Any:
        array = super().view(like, memory, offset, shape, False)
        copy = _aligned(shape, array.dtype)
        copy[...] = array
        return self._put(copy, like.owner.source)

    @staticmethod
    def _put(host: NDArray, device: Any) -> Any:
        with jax_types(host.dtype):
            return sys.modules["jax"].device_put(host, device)


class Torch:
    """torch.Tensor in host memory or on a GPU; the owner is the tensor. Results carry no gradient."""

    def describe(self, tensor: Any, name: str) -> Buffer:
        torch = sys.modules["torch"]
        if not (tensor.is_cpu or tensor.is_cuda):
            if tensor.is_meta:
                raise type_error(name, tensor, "must hold values, not be on the meta device")
            rule = f"must be in host memory or on a GPU, not on {tensor.device}: pass {name}.cpu()"
            raise type_error(name, tensor, rule)
        if tensor.layout is not torch.strided or tensor.is_nested:
            rule = f"must be dense, not sparse or nested ({tensor.layout}): pass its values or {name}.to_dense()"
            raise type_error(name, tensor, rule)
        if tensor.is_quantized:
            rule = f"must not be quantized: pass {name}.int_repr(), and its scales beside it"
            raise type_error(name, tensor, rule)
        lazy = tensor.is_conj() or tensor.is_neg()
        if lazy:
            tensor = tensor.detach().resolve_conj().resolve_neg()
        rule = "must be a plain tensor with memory of its own (a wrapper: pass its to_local() or wait())"
        try:
            address = tensor.data_ptr()
        except RuntimeError as error:
            raise type_error(name, tensor, rule) from error
        nbytes = tensor.nbytes
        if nbytes and not address:
            raise type_error(name, tensor, rule)
        return Buffer(
            address,
            nbytes,
            tuple(tensor.shape),
            torch_dtype_name(tensor.dtype),
            tensor.element_size(),
            tensor.is_contiguous(),
            lazy,  # written values would stay in the resolved copy
            "torch",
            tensor,
            tensor.get_device() if tensor.is_cuda else None,
        )

    def strides(self, buffer: Buffer) -> Shape:
        return tuple(step * buffer.itemsize for step in buffer.owner.stride())

    def packed(self, buffer: Buffer) -> Buffer:
        return self.describe(buffer.owner.detach().contiguous(), "")

    def new(self, like: Buffer, shape: Shape) -> Buffer:
        return self.describe(sys.modules["torch"].empty(shape, dtype=like.owner.dtype, device=like.owner.device), "")

    def result(self, buffer: Buffer) -> Any:
        return buffer.owner

    def crosses(self, buffer: Buffer, stream: int) -> bool:
        torch = sys.modules["torch"]
        buffer.owner.record_stream(torch.cuda.ExternalStream(stream, device=buffer.device))
        return True

    def follows(self) -> bool:
        return True

    def view(self, like: Buffer, memory: Any, offset: int, shape: Shape, readonly: bool) -> Any:
        torch, dtype, count = sys.modules["torch"], like.owner.dtype, math.prod(shape)
        if not count:  # frombuffer refuses empty views
            return torch.empty(shape, dtype=dtype, device=like.owner.device)
        if isinstance(memory, DeviceBytes):
            part = DeviceBytes(memory.address + offset, count * like.itemsize, memory.owner)
            return torch.as_tensor(_CudaArray(part), device=like.owner.device).view(dtype).view(shape)
        if readonly or not memory.flags.writeable:  # torch has no read-only tensors
            memory, offset = memory[offset : offset + count * like.itemsize].copy(), 0
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
