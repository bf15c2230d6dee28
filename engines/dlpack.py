"""Arrays on a device, and DLPack, through which other libraries borrow them without a copy.

The structures are those of dlpack.h, version 0.8, with the capsule "dltensor" that every reader accepts.
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
    """A C-contiguous array in device memory: a result of an engine there, or an argument of its methods.

    It is read-only, also for those who borrow it by DLPack: an engine that was refitted with it keeps it, to
    restore it when a later refit fails.  `numpy.asarray` copies it to the host.

    Attributes:
        shape, dtype: as in NumPy.
        pointer: address on the device.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pointer: int

    @abstractmethod
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Copy to the host; waits until the array is computed."""

    @abstractmethod
    def __getitem__(self, part: slice) -> DeviceArray:
        """A contiguous range of the first axis; a view, as in NumPy."""

    @abstractmethod
    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """The array in another shape; a view, as in NumPy."""

    @abstractmethod
    def concatenated(self, arrays: Sequence[NDArray[Any] | DeviceArray]) -> DeviceArray:
        """A new array on this array's device: `arrays` joined along the first axis."""

    def repeat(self, count: int, axis: int = 0) -> DeviceArray:
        """A new array with each entry of the first axis `count` times, as in NumPy."""
        return self.concatenated([self[k : k + 1] for k in range(self.shape[0]) for _ in range(count)])

    def __reduce__(self) -> Any:  # pickles a NumPy array
        return np.asarray, (np.asarray(self),)


def concatenate(arrays: Sequence[NDArray[Any] | DeviceArray]) -> NDArray[Any] | DeviceArray:
    """Join arrays along the first axis, on a device if any of them is on one; a single array is returned."""
    if len(arrays) == 1:
        return arrays[0]
    on_device = next((array for array in arrays if isinstance(array, DeviceArray)), None)
    return np.concatenate(arrays) if on_device is None else on_device.concatenated(arrays)


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

# What other libraries still borrow: address of its structure -> the structure, and the array behind it.
_borrowed: dict[int, tuple[Any, ...]] = {}


def _free(managed: Any) -> None:
    _borrowed.pop(ctypes.addressof(managed.contents), None)


def _free_unread(capsule: int) -> None:
    """Free the array of a capsule that nobody consumed; a consumed one has another name and another owner."""
    if ctypes.pythonapi.PyCapsule_IsValid(ctypes.c_void_p(capsule), NAME):
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype = ctypes.c_void_p
        _borrowed.pop(pointer(ctypes.c_void_p(capsule), NAME), None)


# Called from C; they must live as long as this module.
_FREE, _FREE_UNREAD = _Deleter(_free), ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_free_unread)


def capsule(array: DeviceArray, pointer: int, device: tuple[int, int]) -> Any:
    """A capsule for `__dlpack__`; `array` is kept alive until its reader frees it.

    Args:
        array: C-contiguous, with a dtype of NumPy's.
        pointer: address of its first number.
        device: (DLDeviceType, index).
    """
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    bits, code = 8 * array.dtype.itemsize, CODES[array.dtype.kind]
    tensor = _Tensor(pointer, *device, len(array.shape), code, bits, 1, shape, None, 0)
    managed = _Managed(tensor, None, _FREE)
    address = ctypes.addressof(managed)
    _borrowed[address] = managed, shape, array
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, NAME, ctypes.cast(_FREE_UNREAD, ctypes.c_void_p))
