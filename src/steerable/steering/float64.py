"""Arithmetic in float64, which Apple's GPU (MPS) does not have: what is computed in it is taken to the CPU there."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_device(device: torch.device | str) -> torch.device:
    """Where float64 numbers that belong to a device are kept: there, or on the CPU for MPS."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def wide(x: Tensor) -> Tensor:
    """x in float64, where `wide_device` says."""
    return x.to(wide_device(x.device)).double()
