"""Implementations of ops for Ascend NPUs; with `device/` the only place that may use torch_npu.

They call `torch.ops.npu.*`, which torch_npu registers when `device/npu` imports it; importing this package needs
nothing. Each module says which fused operator it takes, what that operator asks of its arguments (op-plugin's
documents of torch_npu 2.9 to 2.13, the wheel's Meta kernels), and the way around where it cannot be used.
`common.need` checks what the Meta kernels let pass, because a wrong shape would otherwise be read as right numbers on
the device.
"""

from surefoot.ops.npu import attention, conv, delta, elementwise, norm, quant  # noqa: F401
