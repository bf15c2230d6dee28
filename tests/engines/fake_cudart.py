"""A stand-in for CUDA's runtime in host memory: what engines/nvidia/cuda.py calls, faults on demand.

A stream does nothing before somebody waits for it, and memory that was freed or never written holds NaN: what
is not ordered between two streams gives wrong results, every time.
"""

from __future__ import annotations

import collections
import ctypes
import enum
import functools
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace


class Code(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400


SAID = {
    Code.cudaErrorInvalidValue: b"invalid argument",
    Code.cudaErrorMemoryAllocation: b"out of memory",
    Code.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    Code.cudaErrorNoDevice: b"no CUDA-capable device is detected",
    Code.cudaErrorInvalidDevice: b"invalid device ordinal",
    Code.cudaErrorInvalidResourceHandle: b"invalid resource handle",
}


class Queue:
    """What was enqueued on a stream, which is of the GPU `device`."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.calls: collections.deque[Callable[[], object]] = collections.deque()
        self.done = 0

    def reach(self, count: int) -> None:
        """Run until so many were run since the beginning."""
        while self.done < count:
            self.done += 1
            self.calls.popleft()()

    @property
    def end(self) -> int:
        return self.done + len(self.calls)


class Cuda(ModuleType):
    """`cuda.bindings.runtime`.

    Attributes:
        devices: how many GPUs there are.
        current: the calling thread's.
        room: how many allocations still succeed.
        no_gpu: the code of every question for a GPU, where there is none.
        copies: (kind, bytes) of every copy: "up" to the device, "down" from it, "there" on it.
    """

    cudaError_t = Code
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="there"
    )

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.devices, self.of_thread = 1, threading.local()
        self.room, self.no_gpu = 10_000, Code.cudaSuccess
        self.memory: dict[int, object] = {}
        self.homes: dict[int, int] = {}  # address -> device
        self.freed: list[object] = []
        self.copies: list[tuple[str, int]] = []
        self.waits = self.launches = 0
        self.queues: list[Queue] = []
        self.recording: list[object] | None = None

    @property
    def current(self) -> int:
        return getattr(self.of_thread, "index", 0)

    def home(self, pointer) -> int | None:
        """Of the memory that an address is in."""
        starts = (s for s, buffer in self.memory.items() if s <= pointer < s + len(buffer))
        return self.homes.get(next(starts, None))

    def enqueue(self, stream, function, *arguments) -> None:
        self.queues[stream].calls.append(functools.partial(function, *arguments))

    def cudaGetErrorString(self, code):
        return Code.cudaSuccess, SAID[code]

    def cudaGetDeviceProperties(self, index):
        code = self.no_gpu if index < self.devices else Code.cudaErrorInvalidDevice
        return code, SimpleNamespace(name=b"Fake RTX\0\0", major=8, minor=9, totalGlobalMem=8_000_000)

    def cudaSetDevice(self, index):
        if index >= self.devices:
            return (Code.cudaErrorInvalidDevice,)
        self.of_thread.index = index
        return (Code.cudaSuccess,)

    def cudaMemGetInfo(self):
        return Code.cudaSuccess, 5_000_000, 8_000_000

    def cudaStreamCreateWithFlags(self, flags):
        self.queues.append(Queue(self.current))
        return Code.cudaSuccess, len(self.queues) - 1

    def cudaStreamDestroy(self, stream):
        return (Code.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        self.waits += 1
        self.queues[stream].reach(self.queues[stream].end)
        return (Code.cudaSuccess,)

    def cudaDeviceSynchronize(self):
        for queue in self.queues:
            queue.reach(queue.end)
        return (Code.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags):
        return Code.cudaSuccess, SimpleNamespace(device=self.current, queue=None, count=0)

    def cudaEventRecord(self, event, stream):
        if event.device != self.queues[stream].device:
            return (Code.cudaErrorInvalidResourceHandle,)
        event.queue, event.count = self.queues[stream], self.queues[stream].end
        return (Code.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.enqueue(stream, event.queue.reach, event.count)
        return (Code.cudaSuccess,)

    def cudaEventDestroy(self, event):
        return (Code.cudaSuccess,)

    def cudaMallocAsync(self, size, stream):
        if self.room <= 0:
            return Code.cudaErrorMemoryAllocation, None
        self.room -= 1
        buffer = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        self.homes[ctypes.addressof(buffer)] = self.queues[stream].device
        return Code.cudaSuccess, ctypes.addressof(buffer)

    def cudaFreeAsync(self, pointer, stream):
        self.enqueue(stream, self._free, pointer)
        return (Code.cudaSuccess,)

    def _free(self, pointer) -> None:
        buffer = self.memory.pop(pointer)
        buffer[:] = b"\xff" * len(buffer)
        self.freed.append(buffer)  # who still reads it finds NaN, and does not crash

    def cudaMemcpyAsync(self, to, source, count, kind, stream):
        if kind == "there" and self.home(to) != self.home(source):
            return (Code.cudaErrorInvalidValue,)
        self.copies.append((kind, count))
        read_now = ctypes.string_at(source, count) if kind == "up" else source
        self.enqueue(stream, ctypes.memmove, to, read_now, count)
        return (Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return Code.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph, flags):
        return Code.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph):
        return (Code.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable):
        return (Code.cudaSuccess,)

    def cudaGraphLaunch(self, executable, stream):
        if self.current != self.queues[stream].device:
            return (Code.cudaErrorInvalidResourceHandle,)
        self.launches += 1
        for call in executable:
            self.enqueue(stream, call)
        return (Code.cudaSuccess,)
