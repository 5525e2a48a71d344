"""Implementations of ops for NVIDIA GPUs; with `device/` the only place that may use torch.cuda."""
