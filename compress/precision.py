"""Tell where products in bfloat16 are faster and as good."""

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # newer versions of torch
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return False
