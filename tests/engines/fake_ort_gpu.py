"""A stand-in for ONNX Runtime's package for GPUs: the CPU's own, with the engines that a GPU would get."""

from __future__ import annotations

from hyperrt.engines import onnxruntime as backend


def install(monkeypatch) -> list[str]:
    """Make every provider the CPU's; returns a list that gets the stems of the files that are captured."""
    files: list[str] = []
    graph_engine, engine = backend.CudaGraphEngine, backend.OnnxRuntimeEngine

    def session(path, options, provider, capture, device):
        if capture:
            files.append(path.stem)
        return backend._session(path, options, [backend.CPU])

    monkeypatch.setattr(backend, "check", lambda provider, device: None)
    monkeypatch.setattr(backend, "_load_libraries", lambda provider: None)
    monkeypatch.setattr(backend, "_gpu_session", session)
    monkeypatch.setattr(backend, "CudaGraphEngine", lambda session, *_: graph_engine(session, "cpu"))
    monkeypatch.setattr(backend, "OnnxRuntimeEngine", lambda session, *_: engine(session))
    return files
