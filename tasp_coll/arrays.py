"""What the caller handed in -> pointer and bytes, and results of the caller's own kind.

    buffer = describe(send, "send")             # no copy
    out = new(buffer, (4 * n, *rest))           # memory for a result
    ...                                         # bytes move into out.address
    return result(out)                          # NumPy array, torch tensor, jax.Array, bytearray ...

Only frameworks that are already loaded are touched. Memory is the host's, or a GPU's (torch, CuPy, JAX, and what has
`__cuda_array_interface__` where CuPy is installed), which only its own framework reads and writes.
"""

from __future__ import annotations

import array as stdarray
import ctypes
import sys
from typing import Any

import numpy as np

from .frameworks import (
    Buffer,
    DeviceBytes,
    Dlpack,
    Flat,
    Held,
    HeldKind,
    Jax,
    Kind,
    NDArray,
    Plain,
    Torch,
    buffer_of,
    type_error,
)
from .frameworks_gpu import Cupy, JaxOnGpu

__all__ = [
    "Buffer",
    "DeviceBytes",
    "crosses",
    "describe",
    "follows",
    "memory_at",
    "new",
    "overlap",
    "packed",
    "part",
    "result",
    "view",
]

_TORCH = Torch()
_JAX = Jax()
_FLAT = Flat()
_CUPY = Cupy()
_JAX_ON_GPU = JaxOnGpu()
_FLAT_TYPES: dict[str, type[Any]] = {"array": stdarray.array, "bytearray": bytearray, "bytes": bytes}
_EXPORTER = HeldKind()
_KINDS: dict[str, Kind] = {
    "numpy": Plain(),
    "torch": _TORCH,
    "jax": _JAX,
    "dlpack": Dlpack(),
    "cupy": _CUPY,
    "jax_gpu": _JAX_ON_GPU,
    **dict.fromkeys(_FLAT_TYPES, _FLAT),
    **dict.fromkeys(("memoryview", "buffer", "interface"), _EXPORTER),
}
_KDLCPU = 1  # DLPack's device type of ordinary host memory


def describe(array: Any, name: str) -> Buffer:
    """Where the memory of `array` is and what is in it, without a copy (except that a NumPy scalar becomes an
    array, and a lazily conjugated or negated torch tensor is resolved; both are then read-only).

    NumPy arrays, dense torch tensors, jax.Arrays, and anything with DLPack,
    `__array_interface__` or the buffer protocol; any shape, any strides, any dtype whose elements are plain
    bytes. `name` is the argument's name. ArgumentTypeError says what to pass instead of anything else.
    """
    if type(array) is np.ndarray:
        return buffer_of(array, array, "numpy", name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return _TORCH.describe(array, name)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, getattr(jax, "Array", ())):
        return (_JAX_ON_GPU if JaxOnGpu.holds(array) else _JAX).describe(array, name)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return _CUPY.describe(array, name)
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            rule = f"must not be masked, the mask would be lost: pass {name}.filled() or {name}.data"
            raise type_error(name, array, rule)
        host = np.asarray(array)
        return buffer_of(host, host, "numpy", name)
    return _describe_exporter(array, name)


def packed(buffer: Buffer) -> Buffer:
    """The same elements in C order: `buffer` itself if it is contiguous, else a fresh, writable copy."""
    return buffer if buffer.contiguous else _KINDS[buffer.kind].packed(buffer)


def new(like: Buffer, shape: tuple[int, ...]) -> Buffer:
    """Fresh C-contiguous memory, contents undefined, for a result of `like`'s kind and dtype."""
    return _KINDS[like.kind].new(like, shape)


def result(buffer: Buffer) -> Any:
    """The caller's object for a Buffer made by `new`, without a copy. Write nothing to the memory afterwards:
    JAX's arrays are immutable.

    Kinds that cannot be made (memoryview, ctypes, mmap, `__array_interface__`) become NumPy arrays, bytes a
    bytearray; array.array and bytearray have one dimension whatever the shape.
    """
    return _KINDS[buffer.kind].result(buffer)


def view(
    like: Buffer, memory: NDArray | DeviceBytes, offset: int, shape: tuple[int, ...], *, readonly: bool = False
) -> Any:
    """An array of `like`'s kind and dtype over `memory` (1-d, uint8, where `like` is) from byte `offset` on, no copy.

    It is a copy after all for JAX, whose arrays are immutable and read asynchronously, and for a read-only
    view in torch or through DLPack, which have none; on a GPU the caller is trusted. For exporters of the buffer
    protocol it is NumPy's.
    """
    return _KINDS[like.kind].view(like, memory, offset, shape, readonly)


def part(buffer: Buffer, offset: int, nbytes: int) -> NDArray | DeviceBytes:
    """Some bytes of a contiguous array, as `view` takes memory; they keep the array alive."""
    if buffer.device is not None:
        return DeviceBytes(buffer.address + offset, nbytes, buffer.owner)
    return memory_at(buffer.address + offset, nbytes, buffer.owner)


def crosses(buffer: Buffer, stream: int) -> bool:
    """Tell the allocator of an array on a GPU that a stream (its handle) uses it until all that it was given is done.

    False where the framework cannot be told: then somebody has to hold the array until then.
    """
    return _KINDS[buffer.kind].crosses(buffer, stream)


def follows(buffer: Buffer) -> bool:
    """Whether its framework gives an array's memory away in the order of the stream that is current for it, so that a
    call on that stream may let the array go before the GPU is done."""
    return _KINDS[buffer.kind].follows()


def overlap(a: Buffer, b: Buffer) -> bool:
    """Whether the byte ranges from first to last element intersect; strided arrays that interleave do too."""
    if not a.nbytes or not b.nbytes:
        return False
    (a_start, a_stop), (b_start, b_stop) = _span(a), _span(b)
    return a_start < b_stop and b_start < a_stop


def memory_at(address: int, nbytes: int, owner: Any = None) -> NDArray:
    """The bytes at an address, (nbytes,) uint8. Keeps nothing alive but `owner`: the rest is up to the caller."""
    if not nbytes:
        return np.empty(0, np.uint8)
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    memory.owner = owner
    return np.frombuffer(memory, np.uint8)


def _span(buffer: Buffer) -> tuple[int, int]:
    if buffer.contiguous:
        return buffer.address, buffer.address + buffer.nbytes
    strides = _KINDS[buffer.kind].strides(buffer)
    reach = [step * (count - 1) for step, count in zip(strides, buffer.shape, strict=True)]
    start = buffer.address + sum(step for step in reach if step < 0)
    return start, buffer.address + sum(step for step in reach if step > 0) + buffer.itemsize


def _describe_exporter(array: Any, name: str) -> Buffer:
    """Objects known by what they export; a protocol that tells the caller's own kind of array goes first."""
    if isinstance(array, np.generic):  # first: numpy.bytes_ is bytes too
        host = np.asarray(array)
        host.flags.writeable = False  # a copy: nothing written to it would reach the caller
        return buffer_of(host, host, "numpy", name)
    for kind, type_ in _FLAT_TYPES.items():
        if isinstance(array, type_):
            return _describe_memory(array, kind, name)
    if hasattr(array, "__cuda_array_interface__"):
        return _describe_cuda(array, name)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _describe_dlpack(array, name)
    if hasattr(array, "__array_interface__"):
        host = np.asarray(array)
        return buffer_of(host, Held(host, array), "interface", name)
    return _describe_memory(array, "memoryview" if isinstance(array, memoryview) else "buffer", name)


def _describe_cuda(array: Any, name: str) -> Buffer:
    try:
        import cupy
    except ImportError as error:
        rule = f"must be in host memory where CuPy is not installed ({error}): pass a copy on the host"
        raise type_error(name, array, rule) from error
    return _CUPY.describe(cupy.asarray(array), name)


def _describe_dlpack(array: Any, name: str) -> Buffer:
    device, number = array.__dlpack_device__()
    if int(device) != _KDLCPU:
        rule = f"must be in host memory, not on DLPack device {int(device), number}: pass a copy on the host"
        raise type_error(name, array, rule)
    try:
        host = np.from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        rule = f"must have a dtype that NumPy takes through DLPack: pass its bits as integers ({error})"
        raise type_error(name, array, rule) from error
    return buffer_of(host, Held(host, array), "dlpack", name)


def _describe_memory(array: Any, kind: str, name: str) -> Buffer:
    try:
        exported = memoryview(array)
    except TypeError as error:
        protocols = "NumPy, torch, JAX, DLPack, __array_interface__ or the buffer protocol"
        rule = f"must be an array ({protocols}): pass numpy.asarray({name})"
        raise type_error(name, array, rule) from error
    try:
        host = np.asarray(exported)
    except ValueError as error:
        raise type_error(name, array, f"must hold elements of a type that NumPy knows ({error})") from error
    return buffer_of(host, Held(host, array), kind, name)
