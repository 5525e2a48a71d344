"""Every operation the models need, each declared once as an `OpSpec` (see `ops/spec.py`).

References live beside their declarations (norm, rotary, linear, activation, attention, conv, delta); faster
pure-PyTorch forms for any device are in `ops/torch_native.py`; device kernels in `ops/cpu`, `ops/cuda`, `ops/npu`.
"""

from surefoot.ops.activation import add, sigmoid_mul, swiglu
from surefoot.ops.attention import kv_write, paged_attention
from surefoot.ops.conv import causal_conv, causal_conv_step
from surefoot.ops.delta import delta_gates, gated_delta_chunk, gated_delta_step
from surefoot.ops.linear import embedding, linear
from surefoot.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from surefoot.ops.quant import linear_w4, linear_w8
from surefoot.ops.rotary import rotary, rotary_angles
from surefoot.ops.spec import REGISTRY, chosen, forget_chosen, intercept, meta_as, use

from surefoot.ops import cpu, npu, torch_native  # noqa: F401  isort: skip  (register implementations)

__all__ = [
    "REGISTRY",
    "add",
    "add_rms_norm",
    "causal_conv",
    "causal_conv_step",
    "chosen",
    "delta_gates",
    "embedding",
    "forget_chosen",
    "gated_delta_chunk",
    "gated_delta_step",
    "gated_rms_norm",
    "intercept",
    "kv_write",
    "linear",
    "linear_w4",
    "linear_w8",
    "meta_as",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_angles",
    "sigmoid_mul",
    "swiglu",
    "use",
]
