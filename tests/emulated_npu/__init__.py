"""An emulated Ascend NPU: `npu:0` on stock PyTorch, held against a torch_npu release's real schemas and Meta kernels.

    from emulated_npu.machine import machine

    with machine("2.13.0") as npu:                     # torch_npu can be imported and torch.device("npu:0") works
        engine = Engine.load("canary-llama", EngineConfig(device="npu:0"))
        ...
    npu.uses, npu.npu_calls                            # every aten operator with its status; every npu:: call

What it proves: schemas, dtypes, shapes, data flow, operator coverage, and that no tensor leaves the device unasked.
What it cannot prove: CANN's own checks, the kernels' numbers, speed. Needs the wheels that `make test-npu` downloads.
"""
