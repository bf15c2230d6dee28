"""Trains base models and hypernetworks, with PyTorch; `hyperrt train` and its kin are the commands."""

import hyperrt.engines  # noqa: F401 - switches telemetry off before PyTorch's libraries are imported
