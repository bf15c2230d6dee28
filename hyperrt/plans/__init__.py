"""Compiled TensorRT plans: built, kept in the user's cache, checked before they are loaded."""
