"""Arrays on a device, and DLPack, by which another program takes them without a copy.

The structures are those of dlpack.h, version 0.8, whose capsule is called "dltensor": every reader takes it.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU, CUDA = 1, 2  # DLDeviceType
CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode
NAME = b"dltensor"


class DeviceArray(ABC):
    """An array in a device's memory, as an engine there returns it; `run`, `bind` and `refit` take it there.

    Nothing writes to it again, nor may whoever reads it by DLPack: an engine that was refitted with it keeps
    it, to go back to.  `numpy.asarray` copies it to the host.

    Attributes:
        shape, dtype: as of a NumPy array; C-contiguous.
        pointer: address on the device.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pointer: int

    @abstractmethod
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """A copy on the host; waits for what computes it."""

    @abstractmethod
    def __getitem__(self, part: slice) -> DeviceArray:
        """Some entries of the first axis, one after the other; a view, as in NumPy."""

    @abstractmethod
    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """The same numbers in another shape; a view, as in NumPy."""

    @abstractmethod
    def concatenated(self, arrays: Sequence[NDArray[Any] | DeviceArray]) -> DeviceArray:
        """A new array on this one's device: `concatenate`."""

    def repeat(self, count: int, axis: int = 0) -> DeviceArray:
        """A new array with each entry of the first axis `count` times, as NumPy's."""
        return self.concatenated([self[k : k + 1] for k in range(self.shape[0]) for _ in range(count)])

    def __reduce__(self) -> Any:  # what is pickled is a NumPy array
        return np.asarray, (np.asarray(self),)


def concatenate(arrays: Sequence[NDArray[Any] | DeviceArray]) -> NDArray[Any] | DeviceArray:
    """Arrays one after the other along the first axis, on a device if one is there; one alone is itself."""
    if len(arrays) == 1:
        return arrays[0]
    there = next((array for array in arrays if isinstance(array, DeviceArray)), None)
    return np.concatenate(arrays) if there is None else there.concatenated(arrays)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

# What other programs still hold: address of its structure -> the structure, and the array that it is of.
_held: dict[int, tuple[Any, ...]] = {}


def _free(managed: Any) -> None:
    _held.pop(ctypes.addressof(managed.contents), None)


def _free_unread(capsule: int) -> None:
    """A capsule that nobody took goes: what was taken has another name, and is freed by whoever took it."""
    if ctypes.pythonapi.PyCapsule_IsValid(ctypes.c_void_p(capsule), NAME):
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype = ctypes.c_void_p
        _held.pop(pointer(ctypes.c_void_p(capsule), NAME), None)


# What C calls; kept here for as long as it may.
_FREE, _FREE_UNREAD = _Deleter(_free), ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_free_unread)


def capsule(array: DeviceArray, pointer: int, device: tuple[int, int]) -> Any:
    """A capsule for `__dlpack__`; `array` is kept until its reader lets go.

    Args:
        array: C-contiguous, of a type that NumPy has.
        pointer: where its first number is.
        device: (DLDeviceType, index).
    """
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    bits, code = 8 * array.dtype.itemsize, CODES[array.dtype.kind]
    tensor = _Tensor(pointer, *device, len(array.shape), code, bits, 1, shape, None, 0)
    managed = _Managed(tensor, None, _FREE)
    address = ctypes.addressof(managed)
    _held[address] = managed, shape, array
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, NAME, ctypes.cast(_FREE_UNREAD, ctypes.c_void_p))
