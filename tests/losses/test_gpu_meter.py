"""The fused loss at full size on a GPU, as `GpuMeter` counts it, and the meter itself."""

import pytest
import torch
from gpu_meter import H100, GpuMeter, meta_as_cuda


def test_the_meter_counts_kernels_products_bytes_and_peak_memory():
    with meta_as_cuda(), GpuMeter() as meter:
        a = torch.empty(64, 32, dtype=torch.bfloat16, device="meta")
        b = torch.empty(32, 16, dtype=torch.bfloat16, device="meta")
        out = torch.zeros(64, 16, device="meta")  # writes 4 KiB
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        half = out.to(torch.bfloat16)  # reads 4 KiB, writes 2 KiB
        del half, a
        torch.softmax(out, -1)  # reads 4 KiB three times, writes it
    assert dict(meter.launches) == {"zeros": 1, "addmm": 1, "_to_copy": 1, "_softmax": 1}
    (signature,) = meter.products
    assert signature == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert meter.products[signature].flop == 2 * 64 * 32 * 16
    assert meter.elementwise_bytes == (4 + 6 + 16) * 1024
    assert meter.peak_bytes == (4 + 1 + 4 + 2) * 1024  # a, b, out, half
    assert meter.elementwise_seconds == meter.elementwise_bytes / H100.bandwidth


def test_a_number_that_is_read_from_the_device_is_an_error_under_the_meter():
    with meta_as_cuda(), GpuMeter(), pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros((), device="meta") > 0)


def test_meta_tensors_are_no_cuda_tensors_afterwards():
    before = torch.cuda.mem_get_info, torch.autocast
    with meta_as_cuda(free_gib=2) as calls:
        assert torch.empty(1, device="meta").is_cuda
        assert torch.cuda.mem_get_info()[0] == 2 * 2**30
    assert calls["mem_get_info"] == 1
    assert not torch.empty(1, device="meta").is_cuda
    assert (torch.cuda.mem_get_info, torch.autocast) == before


def test_a_custom_operator_counts_what_its_kernels_launch_and_move():
    with torch.library._scoped_library("meter_test", "FRAGMENT") as library:
        library.define("rows(Tensor x) -> Tensor")
        library.impl("rows", lambda x: x.new_empty(len(x)), "Meta")
        with meta_as_cuda(), GpuMeter(kernels={"rows": lambda x: (3, 2 * x.numel())}) as meter:
            torch.ops.meter_test.rows(torch.empty(4, 8, device="meta"))
    assert meter.launches["rows"] == 3
    assert meter.elementwise_bytes == 64
