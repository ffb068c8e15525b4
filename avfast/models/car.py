"""Context-aware refinement (paper section 3.2): frames from their warp, the last given frame, motion and sound.

Step t = K..T-1 warps V_t by F_{t+1}, reads A_t and renders V_{t+1}. V_t is the given frame for t = K and CAR's own last
output after it, clamped to [0,1]; the loss sees the unclamped one.

Shape legend: B batch, P predicted frames, C channels, H W image, D = 128 feature channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avfast.kernels import backward_warp, shared_weights
from avfast.models.networks import ContextEncoder, MotionEncoder, UNet


class CAR(nn.Module):
    """A U-Net over the warped frame; with context features where there is a context encoder (Table 5, `+ context`), and
    with the motion-conditioned affine of them where there is one (Table 5, `CAR`).

    E_m and E_a are the motion stage's, frozen. E_m and the vectors of E_a are passed in: neither is a submodule."""

    def __init__(
        self, unet: UNet, context_encoder: ContextEncoder | None, affine: nn.ModuleList | None, uses_sound: bool
    ) -> None:
        super().__init__()
        self.unet = unet
        if context_encoder is not None:
            self.context_encoder = context_encoder
        if affine is not None:
            self.affine = affine
        self.has_context, self.has_affine = context_encoder is not None, affine is not None
        self.uses_sound = uses_sound
        """Whether a step takes E_a's vector of its frame."""

    def forward(self, frame: Tensor, flow: Tensor, audio: Tensor | None, motion_encoder: MotionEncoder) -> Tensor:
        """frame V_K (B,C,H,W), flow F_{K+1}..F_T (B,P,2,H,W), audio vectors of A_K..A_{T-1} (B,P,D) or None -> frames
        K+1..T (B,P,C,H,W), not clamped."""
        contexts = self.contexts(frame)
        outputs = []
        with shared_weights():
            for t in range(flow.shape[1]):
                vector = None if audio is None else audio[:, t]
                outputs.append(self.step(frame, flow[:, t], vector, contexts, motion_encoder))
                frame = outputs[-1].clamp(0, 1)
        return torch.stack(outputs, dim=1)

    def contexts(self, frame: Tensor) -> list[Tensor] | None:
        """The context features of V_K (B,C,H,W), computed once per clip; None without a context encoder."""
        return self.context_encoder(frame) if self.has_context else None

    def step(
        self,
        frame: Tensor,
        flow: Tensor,
        audio: Tensor | None,
        contexts: list[Tensor] | None,
        motion_encoder: MotionEncoder,
    ) -> Tensor:
        """One step: frame V_t (B,C,H,W), flow F_{t+1} (B,2,H,W), vector of A_t (B,D) or None, context features or None
        -> V_{t+1} (B,C,H,W), not clamped."""
        affine = motion = None
        if self.has_affine:
            affine = self.affine
            motion = motion_encoder(flow[:, None], frame[:, None])[:, 0].mean(dim=(-2, -1))
            if audio is not None:
                motion = torch.cat((motion, audio), dim=1)
        warped = backward_warp(frame, flow)
        return warped + self.unet(warped, contexts, affine, motion)
