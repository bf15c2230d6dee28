"""NVIDIA GPUs: the driver, CUDA streams and buffers, TensorRT."""
