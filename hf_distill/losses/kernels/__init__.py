"""Kernels of the fused loss for GPUs. Only `row_kernel` needs Triton; `selection` decides whether it is used."""
