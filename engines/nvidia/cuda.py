"""Device memory, a stream and graphs of CUDA: all that an engine on a GPU needs, by way of cuda-bindings.

Everything of an engine is enqueued on its own stream, so nothing has to wait but what leaves the device.  A
stream is of one GPU.  CUDA calls go to the calling thread's current GPU, so whoever calls makes that the
stream's first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from hyperrt.engines import dlpack
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.engines.errors import EngineError, EngineMemoryError
from hyperrt.engines.nvidia import driver
from hyperrt.engines.tensors import Array

NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream
NO_TIMING = 2  # cudaEventDisableTiming
FAILED, FULL = "CUDA failed", "the GPU has no memory left"


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: the vendor's, "NVIDIA H200".
        sm: compute capability, "sm90".
    """

    name: str
    sm: str


def device(index: int = 0) -> Device:
    """The GPU of that number among those that CUDA shows this process.

    Raises:
        EngineError: there is none, or no driver.
    """
    with explained("no NVIDIA GPU can be used"):
        try:
            properties = _call(cudart.cudaGetDeviceProperties, index)
        except EngineError:
            driver.check_device(driver.driver(), index)  # if one of the two is missing, it says so
            raise
    name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")
    return Device(name, f"sm{properties.major}{properties.minor}")


class Stream:
    """A stream, and the memory that is used on it and keeps it; freed when nothing refers to it.

    Args:
        device: the number of its GPU.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.handle = int(self.call(cudart.cudaStreamCreateWithFlags, NON_BLOCKING))
        weakref.finalize(self, cudart.cudaStreamDestroy, self.handle)

    def use(self) -> None:
        """Make its GPU the calling thread's current one.

        It stays that: to go back to one that was not used before would take memory there.
        """
        _call(cudart.cudaSetDevice, self.device)

    def call(self, function: Any, *arguments: Any) -> Any:
        """A function of CUDA, on its GPU: the results.

        Raises:
            EngineError: CUDA says that it failed.
        """
        self.use()
        return _call(function, *arguments)

    def wait(self) -> None:
        """Until everything that was enqueued is done."""
        self.call(cudart.cudaStreamSynchronize, self.handle)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """New memory, its contents undefined.

        Raises:
            EngineMemoryError: the device has no more.
        """
        return Buffer(self, shape, np.dtype(dtype))

    def upload(self, pairs: Iterable[tuple[Array | DeviceArray, Buffer]]) -> None:
        """Enqueue copies, from the host or from anywhere on a GPU, each into a buffer of the same size.

        A host array can be changed when this returns: CUDA has read it, as it is not page-locked.
        """
        pairs = [(self._within_reach(array), into) for array, into in pairs]
        others = {array.stream for array, _ in pairs if isinstance(array, Buffer)} - {self}
        for other in others:
            self._follow(other)  # which may still be computing them
        for array, into in pairs:
            if isinstance(array, DeviceArray):
                self._copy(into.pointer, array.pointer, into.nbytes, "cudaMemcpyDeviceToDevice")
            else:
                self._copy(into.pointer, array.ctypes.data, into.nbytes, "cudaMemcpyHostToDevice")
        for other in others:
            other._follow(self)  # where they may be freed at once

    def _within_reach(self, array: Array | DeviceArray) -> Array | DeviceArray:
        """The array, on the host if it is on another GPU: not every one can read another's memory."""
        if isinstance(array, Buffer) and array.stream.device != self.device:
            return np.asarray(array)
        return array

    def download(self, buffer: DeviceArray) -> Array:
        """A copy on the host; waits."""
        array = np.empty(buffer.shape, buffer.dtype)
        self._copy(array.ctypes.data, buffer.pointer, array.nbytes, "cudaMemcpyDeviceToHost")
        self.wait()
        return array

    def copy(self, buffer: Buffer) -> Buffer:
        """Enqueue a copy of a buffer into memory of its own."""
        new = self.allocate(buffer.shape, buffer.dtype)
        self._copy(new.pointer, buffer.pointer, buffer.nbytes, "cudaMemcpyDeviceToDevice")
        return new

    def record(self, enqueue: Callable[[], object]) -> Recorded:
        """What `enqueue` enqueues on this stream, as one launch; nothing is run now."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call(cudart.cudaStreamBeginCapture, self.handle, mode)
        try:
            enqueue()
        finally:
            graph = self.call(cudart.cudaStreamEndCapture, self.handle)
        executable = self.call(cudart.cudaGraphInstantiate, graph, 0)
        self.call(cudart.cudaGraphDestroy, graph)
        return Recorded(self, executable)

    def _follow(self, other: Stream) -> None:
        """Let what is enqueued here from now on wait for what is enqueued there; the host does not wait."""
        event = self.call(cudart.cudaEventCreateWithFlags, NO_TIMING)
        self.call(cudart.cudaEventRecord, event, other.handle)
        self.call(cudart.cudaStreamWaitEvent, self.handle, event, 0)
        self.call(cudart.cudaEventDestroy, event)  # as soon as it was reached

    def _copy(self, to: int, source: int, nbytes: int, kind: str) -> None:
        which = getattr(cudart.cudaMemcpyKind, kind)
        self.call(cudart.cudaMemcpyAsync, to, source, nbytes, which, self.handle)


class _Memory:
    """Memory on the device; freed, in the stream's order, when nothing refers to it."""

    def __init__(self, stream: Stream, nbytes: int) -> None:
        self.stream = stream  # which must not go before it
        self.pointer = int(stream.call(cudart.cudaMallocAsync, max(1, nbytes), stream.handle))
        weakref.finalize(self, cudart.cudaFreeAsync, self.pointer, stream.handle)


class Buffer(DeviceArray):
    """An array on the device, in memory of its own or in a part of another's.

    `numpy.asarray` makes a copy on the host; other programs take it by DLPack.
    """

    def __init__(
        self,
        stream: Stream,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        memory: _Memory | None = None,
        start: int = 0,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.stream = stream
        self._memory = memory or _Memory(stream, self.nbytes)
        self._start = start  # bytes
        self.pointer = self._memory.pointer + start

    def __getitem__(self, part: slice) -> Buffer:
        first, last, _ = part.indices(self.shape[0])
        start = self._start + first * (self.nbytes // self.shape[0])
        return Buffer(self.stream, (last - first, *self.shape[1:]), self.dtype, self._memory, start)

    def reshape(self, shape: tuple[int, ...]) -> Buffer:
        return Buffer(self.stream, shape, self.dtype, self._memory, self._start)

    def concatenated(self, arrays: Sequence[Array | DeviceArray]) -> Buffer:
        ends = np.cumsum([array.shape[0] for array in arrays]).tolist()
        new = self.stream.allocate((ends[-1], *self.shape[1:]), self.dtype)
        places = [new[end - array.shape[0] : end] for array, end in zip(arrays, ends, strict=True)]
        self.stream.upload(zip(arrays, places, strict=True))
        return new

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array on the device cannot be had on the host without a copy")
        return self.stream.download(self).astype(dtype or self.dtype, copy=False)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.stream.device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        if stream != self.stream.handle:  # the reader's own stream knows nothing of what is enqueued here
            self.stream.wait()
        return dlpack.capsule(self, self.pointer, self.__dlpack_device__())


class Recorded:
    """A CUDA graph: addresses are those of when it was recorded, contents those of when it is launched."""

    def __init__(self, stream: Stream, executable: Any) -> None:
        self._stream, self._executable = stream, executable
        weakref.finalize(self, cudart.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Enqueue it."""
        self._stream.call(cudart.cudaGraphLaunch, self._executable, self._stream.handle)


def memory_free() -> int:
    """Bytes that the current device could still give."""
    free, _ = _call(cudart.cudaMemGetInfo)
    return int(free)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say of CUDA's errors what was being done."""
    try:
        yield
    except EngineError as error:
        if error.what not in (FAILED, FULL):
            raise
        raise type(error)(what, error.why, error.do) from error


def _call(function: Any, *arguments: Any) -> Any:
    """A function of CUDA: its results without the error code, which is raised where it says so."""
    code, *results = function(*arguments)
    if int(code):
        _, text = cudart.cudaGetErrorString(code)
        why = f"CUDA: {text.decode(errors='replace')} ({code.name})"
        if code == cudart.cudaError_t.cudaErrorMemoryAllocation:
            do = "use a smaller batch, --low-memory, or end other programs on the GPU"
            raise EngineMemoryError(FULL, why, do)
        raise EngineError(FAILED, why, "see what is missing: hyperrt doctor")
    return results[0] if len(results) == 1 else tuple(results)
