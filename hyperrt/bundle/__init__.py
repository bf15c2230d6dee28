"""Bundles: the folder of graphs that an export writes, its manifest and its memory."""
