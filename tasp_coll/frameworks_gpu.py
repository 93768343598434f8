"""How arrays on GPUs are read and made, beside torch's: CuPy's and JAX's. See `frameworks`."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

from .frameworks import Buffer, DeviceBytes, Shape, jax_types, numpy_dtype_name, type_error


class Cupy:
    """cupy.ndarray; the owner is the array, and so is what is made of `__cuda_array_interface__`."""

    def describe(self, array: Any, name: str) -> Buffer:
        dtype = numpy_dtype_name(array.dtype)
        flags = array.flags
        address, device = int(array.data.ptr), int(array.device.id)
        return Buffer(
            address, array.nbytes, array.shape, dtype, array.itemsize, flags.c_contiguous, False, "cupy", array, device
        )

    def strides(self, buffer: Buffer) -> Shape:
        found: Shape = buffer.owner.strides
        return found

    def packed(self, buffer: Buffer) -> Buffer:
        with sys.modules["cupy"].cuda.Device(buffer.device):
            return self.describe(sys.modules["cupy"].ascontiguousarray(buffer.owner), "")

    def new(self, like: Buffer, shape: Shape) -> Buffer:
        with sys.modules["cupy"].cuda.Device(like.device):
            return self.describe(sys.modules["cupy"].empty(shape, like.owner.dtype), "")

    def result(self, buffer: Buffer) -> Any:
        return buffer.owner

    def crosses(self, buffer: Buffer, stream: int) -> bool:
        return False

    def follows(self) -> bool:
        return True

    def view(self, like: Buffer, memory: DeviceBytes, offset: int, shape: Shape, readonly: bool) -> Any:
        cupy, dtype = sys.modules["cupy"], like.owner.dtype
        nbytes = math.prod(shape) * like.itemsize
        with cupy.cuda.Device(like.device):
            if not nbytes:
                return cupy.empty(shape, dtype)
            part = cupy.cuda.UnownedMemory(memory.address + offset, nbytes, memory.owner, like.device)
            return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(part, 0))


class OfJax(NamedTuple):
    """The owner of a Buffer on a GPU for JAX. memory: the caller's array, or a cupy.ndarray of ours, flat, of bytes."""

    memory: Any
    dtype: np.dtype[Any]


class JaxOnGpu(Cupy):
    """jax.Array on one GPU. JAX has streams of its own: the host waits until the caller's array is computed, and what
    goes home is CuPy's memory through DLPack, by which JAX comes after CuPy's current stream.

    Bytes travel both ways where CuPy lacks the type: bfloat16 and fp8.
    """

    @staticmethod
    def holds(array: Any) -> bool:
        """Whether this jax.Array is on one GPU."""
        if isinstance(array, sys.modules["jax"].core.Tracer) or array.is_deleted():
            return False
        devices = array.devices()
        return len(devices) == 1 and all(device.platform in ("gpu", "cuda", "rocm") for device in devices)

    def describe(self, array: Any, name: str) -> Buffer:
        try:
            import cupy  # noqa: F401  # by whose memory results go home
        except ImportError as error:
            rule = f"must be in host memory where CuPy is not installed ({error}): pass a copy on the host"
            raise type_error(name, array, rule) from error
        layout = getattr(getattr(array, "format", None), "layout", None)
        order = getattr(layout, "major_to_minor", None)
        if order is not None and tuple(order) != tuple(range(array.ndim)):
            raise type_error(name, array, f"must have the default layout, not {tuple(order)}")
        (device,) = array.devices()
        array.block_until_ready()
        dtype = np.dtype(array.dtype)
        return Buffer(
            int(array.unsafe_buffer_pointer()) if array.nbytes else 0,
            array.nbytes,
            tuple(array.shape),
            numpy_dtype_name(dtype),
            dtype.itemsize,
            True,
            True,  # as all of JAX's arrays
            "jax_gpu",
            OfJax(array, dtype),
            device.local_hardware_id,
        )

    def follows(self) -> bool:
        return False

    def packed(self, buffer: Buffer) -> Buffer:
        return buffer  # always contiguous

    def new(self, like: Buffer, shape: Shape) -> Buffer:
        cupy, dtype = sys.modules["cupy"], like.owner.dtype
        nbytes = math.prod(shape) * dtype.itemsize
        with cupy.cuda.Device(like.device):
            memory = cupy.empty((nbytes,), np.uint8)
        address = int(memory.data.ptr) if nbytes else 0
        return like._replace(address=address, nbytes=nbytes, shape=shape, readonly=False, owner=OfJax(memory, dtype))

    def result(self, buffer: Buffer) -> Any:
        return self._home(buffer.owner.memory, buffer.owner.dtype, buffer.shape)

    def view(self, like: Buffer, memory: DeviceBytes, offset: int, shape: Shape, readonly: bool) -> Any:
        cupy, nbytes = sys.modules["cupy"], math.prod(shape) * like.itemsize
        with cupy.cuda.Device(like.device):
            copy = cupy.empty((nbytes,), np.uint8)
            if nbytes:
                part = cupy.cuda.UnownedMemory(memory.address + offset, nbytes, memory.owner, like.device)
                copy[...] = cupy.ndarray((nbytes,), np.uint8, cupy.cuda.MemoryPointer(part, 0))
            return self._home(copy, like.owner.dtype, shape)

    @staticmethod
    def _home(memory: Any, dtype: np.dtype[Any], shape: Shape) -> Any:
        jax = sys.modules["jax"]
        if dtype.kind in "biufc" and dtype.isbuiltin == 1:
            with jax_types(dtype):
                return jax.dlpack.from_dlpack(memory.view(dtype).reshape(shape))
        tail = (dtype.itemsize,) if dtype.itemsize > 1 else ()
        return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(memory.reshape((*shape, *tail))), dtype)
