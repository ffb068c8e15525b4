"""Kernels of Triton run under its interpreter where there is no GPU; it is chosen before anything imports them."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
