"""The device that models are loaded on where neither the user nor the launcher has chosen one."""

import torch


def default_device() -> torch.device:
    """Return the accelerator of this machine; the CPU without one, and on Apple GPUs, which have no float64."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
