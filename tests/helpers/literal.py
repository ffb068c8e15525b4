"""The paper's equations, written out step by step.

They work from the model's weights alone: one call of every network per time step, the memory rebuilt and condensed at
every step, Recall as attention also over one token, the context features recomputed for every frame, the warp as a sum
over all pixels of hat functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from avfast.models.avmodel import ModelConfig

B, K, T = 3, 2, 5
"""Clips, given frames, and all of them."""


class Literal:
    """The equations on a dictionary of weights (requires_grad where a gradient is wanted)."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], training: bool) -> None:
        self.config, self.w, self.training = config, weights, training
        self.statistics: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        w, b = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        if not self.training or (name.startswith("mme.") and self.config.refinement != "none"):
            return F.batch_norm(x, self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"], w, b)
        dims = (0, *range(2, x.dim()))
        self.statistics.setdefault(name, []).append((x.mean(dims).detach(), x.var(dims, unbiased=True).detach()))
        return F.batch_norm(x, None, None, w, b, training=True)

    def block(self, name: str, x: torch.Tensor, conv, activation) -> torch.Tensor:
        return activation(self.norm(f"{name}.norm", conv(x, self.w[f"{name}.conv.weight"])))

    def encoder(self, flow: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
        x = torch.cat((flow, frame), 1)
        for i in range(4):
            activation = torch.tanh if i == 3 else lambda y: F.leaky_relu(y, 0.2)
            x = self.block(f"mme.encoder.blocks.{i}", x, lambda y, w: F.conv2d(y, w, stride=2, padding=1), activation)
        return x

    def decoder(self, x: torch.Tensor) -> torch.Tensor:
        def up(y, w, b=None):
            return F.conv_transpose2d(y, w, b, stride=2, padding=1)

        for i in range(3):
            x = self.block(f"mme.decoder.blocks.{i}", x, up, lambda y: F.leaky_relu(y, 0.2))
        return up(x, self.w["mme.decoder.last.weight"], self.w["mme.decoder.last.bias"])

    def audio_encoder(self, audio: torch.Tensor) -> torch.Tensor:
        x = audio.flatten(0, 1)
        steps = [(1, 0), (2, 1), (2, 1), (2, 1), (1, 0)]
        for i, (stride, padding) in enumerate(steps):
            activation = torch.tanh if i == 4 else lambda y: F.leaky_relu(y, 0.2)
            x = self.block(
                f"mme.audio_encoder.blocks.{i}",
                x,
                lambda y, w, s=stride, p=padding: F.conv2d(y, w, stride=s, padding=p),
                activation,
            )
        return x.view(audio.shape[0], audio.shape[1], -1)

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v

    def condense(self, memory: torch.Tensor) -> torch.Tensor:
        """Eq. 1 on one memory (B,t,c) -> (B,1,c)."""
        w, b = self.w["mme.condense.qkv.weight"].chunk(3), self.w["mme.condense.qkv.bias"].chunk(3)
        q, k, v = (F.conv1d(memory.transpose(1, 2), w[i][..., None], b[i]).transpose(1, 2) for i in range(3))
        return memory[:, -1:] + self.attention(q, k, v)[:, -1:]

    def recall(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Eq. 2: x (B,c,h,w), memory (B,M,c)."""
        tiled = x.flatten(2).transpose(1, 2)

        def project(name: str, y: torch.Tensor) -> torch.Tensor:
            # `mme` creates no query and key, because with one token they have no influence: any weights will do
            generator = torch.Generator().manual_seed(len(name))
            anything = torch.randn(128, 128, dtype=y.dtype, generator=generator)
            weight = self.w.get(f"mme.recall.{name}.weight", anything).flatten(1)
            bias = self.w.get(f"mme.recall.{name}.bias", anything[0])
            return F.linear(y, weight, bias)

        read = self.attention(project("query", tiled), project("key", memory), project("value", memory))
        return (tiled + read).transpose(1, 2).view_as(x)

    def convlstm(self, x, state):
        new = []
        for layer, (hidden, cell) in enumerate(state):
            weight, bias = self.w[f"mme.lstm.cells.{layer}.weight"], self.w[f"mme.lstm.cells.{layer}.bias"]
            i, f, o, g = F.conv2d(torch.cat((x, hidden), 1), weight, bias, padding=1).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(cell)
            new.append((x, cell))
        return x, new

    @staticmethod
    def warp(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        """Eq. 4: out(p) = sum over q of image(q) hat(x_p - x_q) hat(y_p - y_q), coordinates kept inside the image."""
        h, w = image.shape[-2:]
        rows, columns = torch.arange(h, dtype=flow.dtype), torch.arange(w, dtype=flow.dtype)
        x = (columns[None, None, :] + flow[:, 0]).clamp(0, w - 1)
        y = (rows[None, :, None] + flow[:, 1]).clamp(0, h - 1)
        hat_x = (1 - (x[..., None] - columns).abs()).clamp(min=0)
        hat_y = (1 - (y[..., None] - rows).abs()).clamp(min=0)
        return torch.einsum("bcij,bpqi,bpqj->bcpq", image, hat_y, hat_x)

    def mme(self, frames, flow, audio):
        vectors, image, motion, state = self.begin(frames, flow, audio)
        for t in range(1, T):
            hidden, state = self.read(image[t - 1], motion[t - 1], vectors, state, t)
            if t >= K:
                motion.append(self.decoder(hidden))
                image.append(self.warp(image[t - 1], motion[t]))
        return torch.stack(motion[K:], 1), torch.stack(image[K:], 1), vectors

    def teacher_forced(self, frames, flow, audio):
        """F_2..F_T, each predicted from true frames and flow alone."""
        vectors, image, motion, state = self.begin(frames, flow, audio)
        predicted = []
        for t in range(1, T):
            hidden, state = self.read(image[t - 1], motion[t - 1], vectors, state, t)
            predicted.append(self.decoder(hidden))
        return torch.stack(predicted, 1)

    def begin(self, frames, flow, audio):
        vectors = None if self.config.motion == "v" else self.audio_encoder(audio)
        h, w = frames.shape[-2] // 16, frames.shape[-1] // 16
        state = [(torch.zeros(B, 128, h, w, dtype=frames.dtype),) * 2 for _ in range(self.config.convlstm_layers)]
        return vectors, list(frames.unbind(1)), list(flow.unbind(1)), state

    def read(self, image, motion, vectors, state, t):
        """Step t up to its top hidden state."""
        x = self.encoder(motion, image)
        if vectors is not None:
            memory = torch.stack([vectors[:, n] for n in range(t + 1)], 1)
            x = self.recall(x, self.condense(memory) if self.config.motion == "mme" else memory)
        return self.convlstm(x, state)

    def double_conv(self, name, x):
        for i in range(2):
            x = self.block(f"{name}.blocks.{i}", x, lambda y, w: F.conv2d(y, w, padding=1), F.relu)
        return x

    def car(self, frame, flow, vectors):
        c, outputs, given = self.config, [], frame
        path = torch.zeros_like(flow[:, 0])
        for t in range(K, T):
            z = []
            if c.refinement != "unet":
                x = given
                for level in range(4):
                    x = self.double_conv(f"car.context_encoder.levels.{level}", F.max_pool2d(x, 2) if level else x)
                    z.append(x)
            if c.refinement == "car":
                motion = self.encoder(flow[:, t - K], frame).mean((2, 3))
                if vectors is not None:
                    motion = torch.cat((motion, vectors[:, t - 1]), 1)
                if c.rendering == "composed":
                    motion = F.pad(motion, (0, 1), value=(t + 1 - K) / (t + 1 - K + 5))
                for i in range(4):
                    gamma, beta = (self.mlp(f"car.affine.{i}.{name}", motion) for name in ("gamma", "beta"))
                    z[i] = gamma[:, :, None, None] * z[i] + beta[:, :, None, None]
            warped = self.warp(frame, flow[:, t - K])
            if c.rendering == "composed":
                path = flow[:, t - K] + self.warp(path, flow[:, t - K])
                warped = self.warp(given, path)
            x, skips = warped, []
            for level in range(5):
                x = self.double_conv(f"car.unet.down.{level}", F.max_pool2d(x, 2) if level else x)
                skips.append(x)
            for i in (3, 2, 1, 0):
                name = f"car.unet.up.{i}"
                x = F.conv_transpose2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride=2)
                x = self.double_conv(f"car.unet.decode.{i}", torch.cat([x, skips[i], *z[i : i + 1]], 1))
            outputs.append(warped + F.conv2d(x, self.w["car.unet.last.weight"], self.w["car.unet.last.bias"]))
            frame = warped if c.rendering == "composed" else outputs[-1].clamp(0, 1)
        return torch.stack(outputs, 1)

    def mlp(self, name, x):
        x = F.relu(F.linear(x, self.w[f"{name}.0.weight"], self.w[f"{name}.0.bias"]))
        return F.linear(x, self.w[f"{name}.2.weight"], self.w[f"{name}.2.bias"])
