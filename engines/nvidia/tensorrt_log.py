"""The errors of TensorRT and TensorRT-RTX, which report their cause only to a logger."""

from __future__ import annotations

from typing import Any

from hyperrt.engines.errors import EngineError, EngineMemoryError

RTX = "tensorrt_rtx"  # module of TensorRT-RTX
OTHER_GPU = "does not support this compute capability"
OUT_OF_MEMORY = ("out of memory", "outofmemory", "could not be allocated", "memory allocation failed")


class Log:
    """A logger for TensorRT that keeps error messages."""

    def __init__(self, trt: Any) -> None:
        errors = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in errors:
                    self.errors.append(message)

        self.logger = Logger()

    def cause(self) -> str:
        """The first error since the last call, which causes the ones after it."""
        messages, self.logger.errors = self.logger.errors, []
        return " ".join(messages[0].split()) if messages else "TensorRT does not say why"

    def error(self, what: str, kind: type[EngineError] = EngineError, do: str = "") -> EngineError:
        """An error of class `kind` with the logged cause.

        If the cause is a lack of memory or an unsupported GPU, the class and the advice say so instead.
        """
        why = self.cause()
        if any(sign in why.lower() for sign in OUT_OF_MEMORY):
            return EngineMemoryError(what, why, "use --low-memory, or end other programs on the GPU")
        if OTHER_GPU in why:  # TensorRT-RTX 1.7.1 on an H100; no plan would load
            return EngineError(what, why, "use another backend: --backend onnxruntime-cuda")
        return kind(what, why, do)
