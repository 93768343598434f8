"""Arrays of several kinds on a rank's GPU, or in host memory that stands in for it, for the tests of tests/gpu."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
KINDS = ("cupy", "torch", "interface")


class Place:
    """A rank's GPU; rank None: host memory."""

    def __init__(self, rank: int | None) -> None:
        import torch

        self.on_gpu, self.torch_device = rank is not None, "cpu"
        self._numbers: Any = np
        if rank is not None:
            import cupy

            number = rank % cupy.cuda.runtime.getDeviceCount()
            cupy.cuda.Device(number).use()
            self._numbers = cupy
            if torch.cuda.is_available():
                torch.cuda.set_device(number)
                self.torch_device = f"cuda:{number}"
        self.has_torch = not self.on_gpu or self.torch_device != "cpu"

    @property
    def numbers(self) -> Any:
        """CuPy, or NumPy in its place."""
        return self._numbers

    def settle(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            self._numbers.cuda.Device().synchronize()


class Interface:
    """An array that only says where its memory is."""

    def __init__(self, held: Any) -> None:
        name = "__cuda_array_interface__" if hasattr(held, "__cuda_array_interface__") else "__array_interface__"
        self.held = held
        setattr(type(self), name, property(lambda self: getattr(self.held, name)))


class Kind:
    """One kind of array."""

    def __init__(self, name: str, place: Place) -> None:
        import pytest

        if name == "torch" and not place.has_torch:
            pytest.skip("this torch sees no GPU: install one built for CUDA")
        self.name, self.place = name, place

    def of(self, values: Array) -> Any:
        """An array of these values."""
        if self.name == "torch":
            import torch

            return torch.from_numpy(values.copy()).to(self.place.torch_device)
        held = self.place.numbers.array(values)
        return Interface(held) if self.name == "interface" else held

    def host(self, array: Any) -> Array:
        """Its values, when the GPU is done."""
        self.place.settle()
        array = array.held if isinstance(array, Interface) else array
        if self.name == "torch":
            found: Array = array.cpu().numpy()
            return found
        return np.array(array.get() if self.place.on_gpu else array)

    def set(self, array: Any, values: Array) -> None:
        """Write other values into it."""
        array = array.held if isinstance(array, Interface) else array
        if self.name == "torch":
            import torch

            array.copy_(torch.from_numpy(values.copy()))
        else:
            array[...] = self.place.numbers.array(values)
