"""Implementations of ops for Ascend NPUs; with `device/` the only place that may use torch_npu."""
