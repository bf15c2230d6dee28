"""Data sets: layouts of photos, drawn scenes, the cache and what the encoders make of it."""
