"""Photos: files of many formats as sRGB arrays."""
