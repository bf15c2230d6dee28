"""PyTorch to ONNX to a bundle, with the proof that the graphs compute what the model does.

`export_bundle` is the whole of it; it is imported on first use, because PyTorch takes seconds to load.
"""

from __future__ import annotations

from typing import Any

import hyperrt.engines  # noqa: F401 - switches telemetry off before PyTorch's libraries are imported

__all__ = ["export_bundle"]


def __getattr__(name: str) -> Any:
    if name != "export_bundle":
        raise AttributeError(f"module 'hyperrt.export' has no attribute {name!r}")
    from hyperrt.export.assemble import export_bundle

    return export_bundle
