"""Runs requests: open graphs, subjects in place, conditioning, pictures in flight."""
