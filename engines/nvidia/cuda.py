"""CUDA streams, device buffers and captured graphs, through cuda-bindings.

An engine enqueues everything on one stream, so only copies to the host synchronise.  A stream belongs to one
GPU, and CUDA calls use the calling thread's current GPU: callers first make the stream's GPU the current one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
FAILED, OUT_OF_MEMORY = "CUDA failed", "the GPU has no memory left"


def gpu(index: int = 0) -> driver.Gpu:
    """A GPU, by its number among those that CUDA shows this process.

    Raises:
        EngineError: there is no such GPU, or no driver.
    """
    with explained("no NVIDIA GPU can be used"):
        try:
            properties = _call(cudart.cudaGetDeviceProperties, index)
        except EngineError:
            driver.check_device(driver.driver(), index)  # a better error, if one of these is missing
            raise
    name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")
    return driver.Gpu(name, (properties.major, properties.minor), properties.totalGlobalMem)


class Stream:
    """A stream; its buffers keep it alive, and it is destroyed when nothing refers to it.

    Args:
        device: number of its GPU.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.handle = int(self.call(cudart.cudaStreamCreateWithFlags, NON_BLOCKING))
        weakref.finalize(self, cudart.cudaStreamDestroy, self.handle)

    def use(self) -> None:
        """Make its GPU the calling thread's current one.

        The previous one is not restored: if it was not used before, that would take memory on it.
        """
        _call(cudart.cudaSetDevice, self.device)

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call a function of CUDA on the stream's GPU, and return its results.

        Raises:
            EngineError: the call failed.
        """
        self.use()
        return _call(function, *arguments)

    def wait(self) -> None:
        """Wait until everything that was enqueued is done."""
        self.call(cudart.cudaStreamSynchronize, self.handle)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """A new buffer with undefined content.

        Raises:
            EngineMemoryError: the device is out of memory.
        """
        return Buffer(self, shape, np.dtype(dtype))

    def upload(self, pairs: Iterable[tuple[Array | DeviceArray, Buffer]]) -> None:
        """Enqueue copies of arrays, on the host or on any GPU, each into a buffer of the same size.

        The caller may change a host array after this returns: it is not page-locked, so CUDA has read it.
        """
        pairs = [(self._readable(array), buffer) for array, buffer in pairs]
        others = {array.stream for array, _ in pairs if isinstance(array, Buffer)} - {self}
        for other in others:
            self._wait_for(other)  # it may still compute the arrays
        for array, buffer in pairs:
            if isinstance(array, DeviceArray):
                self._copy(buffer.pointer, array.pointer, buffer.nbytes, "cudaMemcpyDeviceToDevice")
            else:
                self._copy(buffer.pointer, array.ctypes.data, buffer.nbytes, "cudaMemcpyHostToDevice")
        for other in others:
            other._wait_for(self)  # it may free the arrays next

    def _readable(self, array: Array | DeviceArray) -> Array | DeviceArray:
        """The array, copied to the host if it is on another GPU, whose memory may not be accessible."""
        if isinstance(array, Buffer) and array.stream.device != self.device:
            return np.asarray(array)
        return array

    def download(self, buffer: DeviceArray) -> Array:
        """Copy a buffer to the host; waits for it."""
        array = np.empty(buffer.shape, buffer.dtype)
        self._copy(array.ctypes.data, buffer.pointer, array.nbytes, "cudaMemcpyDeviceToHost")
        self.wait()
        return array

    def copy(self, buffer: Buffer) -> Buffer:
        """Enqueue a copy into a new buffer."""
        new = self.allocate(buffer.shape, buffer.dtype)
        self._copy(new.pointer, buffer.pointer, buffer.nbytes, "cudaMemcpyDeviceToDevice")
        return new

    def capture(self, enqueue: Callable[[], object]) -> CapturedGraph:
        """Capture what `enqueue` enqueues on this stream as a CUDA graph, without running it."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call(cudart.cudaStreamBeginCapture, self.handle, mode)
        try:
            enqueue()
        finally:
            graph = self.call(cudart.cudaStreamEndCapture, self.handle)
        executable = self.call(cudart.cudaGraphInstantiate, graph, 0)
        self.call(cudart.cudaGraphDestroy, graph)
        return CapturedGraph(self, executable)

    def _wait_for(self, other: Stream) -> None:
        """Make later work on this stream wait for the work enqueued on `other`; the host does not wait."""
        event = self.call(cudart.cudaEventCreateWithFlags, NO_TIMING)
        self.call(cudart.cudaEventRecord, event, other.handle)
        self.call(cudart.cudaStreamWaitEvent, self.handle, event, 0)
        self.call(cudart.cudaEventDestroy, event)  # CUDA destroys it when it was reached

    def _copy(self, to: int, source: int, nbytes: int, kind: str) -> None:
        direction = getattr(cudart.cudaMemcpyKind, kind)
        self.call(cudart.cudaMemcpyAsync, to, source, nbytes, direction, self.handle)


class _Memory:
    """Device memory; freed, in stream order, when nothing refers to it."""

    def __init__(self, stream: Stream, nbytes: int) -> None:
        self.stream = stream  # keeps the stream alive
        self.pointer = int(stream.call(cudart.cudaMallocAsync, max(1, nbytes), stream.handle))
        weakref.finalize(self, cudart.cudaFreeAsync, self.pointer, stream.handle)


class Buffer(DeviceArray):
    """An array on the device, or a view of a part of one.

    `numpy.asarray` copies it to the host; other libraries borrow it by DLPack.
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
        parts = [new[end - array.shape[0] : end] for array, end in zip(arrays, ends, strict=True)]
        self.stream.upload(zip(arrays, parts, strict=True))
        return new

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array on the device must be copied to the host")
        return self.stream.download(self).astype(dtype or self.dtype, copy=False)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.stream.device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        if stream != self.stream.handle:  # the reader's stream does not wait for this one
            self.stream.wait()
        return dlpack.capsule(self, self.pointer, self.__dlpack_device__())


class CapturedGraph:
    """A CUDA graph: it uses the addresses of its capture, with their content at each launch."""

    def __init__(self, stream: Stream, executable: Any) -> None:
        self._stream, self._executable = stream, executable
        weakref.finalize(self, cudart.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Enqueue the graph."""
        self._stream.call(cudart.cudaGraphLaunch, self._executable, self._stream.handle)


def memory_free() -> int:
    """Free bytes on the current device."""
    free, _ = _call(cudart.cudaMemGetInfo)
    return int(free)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Replace the first line of CUDA's errors by `what`: what was being done."""
    try:
        yield
    except EngineError as error:
        if error.what not in (FAILED, OUT_OF_MEMORY):
            raise
        raise type(error)(what, error.why, error.do) from error


def _call(function: Any, *arguments: Any) -> Any:
    """Call a function of CUDA; returns its results without the error code, and raises on failure."""
    code, *results = function(*arguments)
    if int(code):
        _, text = cudart.cudaGetErrorString(code)
        why = f"CUDA: {text.decode(errors='replace')} ({code.name})"
        if code == cudart.cudaError_t.cudaErrorMemoryAllocation:
            do = "use a smaller batch or --low-memory, or end other programs on the GPU"
            raise EngineMemoryError(OUT_OF_MEMORY, why, do)
        raise EngineError(FAILED, why, "check the installation: hyperrt doctor")
    return results[0] if len(results) == 1 else tuple(results)
