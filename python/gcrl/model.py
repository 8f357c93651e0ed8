"""The axial transformer: an encoder of the whole image, a decoder that predicts each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gcrl.config import ModelConfig, ObjectiveConfig
from gcrl_kernels import axial_attention_packed, linear_color_cross_entropy, nt_xent

DOWN_COLUMNS, ALONG_ROWS = 0, 1


class Losses(NamedTuple):
    """Both parts of the loss, unweighted: float32 scalars (float64 in a float64 model)."""

    generative: Tensor
    """Mean nats per scored pixel of the weak view."""
    contrastive: Tensor
    """NT-Xent, mean over the anchors."""


class Block(nn.Module):
    """Pre-norm residual block: attention along one axis, then an MLP; [B, H, W, C] -> the same."""

    def __init__(
        self, config: ModelConfig, axis: int, *, causal: bool, backend: str | None = None
    ) -> None:
        super().__init__()
        width = config.width
        self.axis, self.causal, self.backend = axis, causal, backend
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width),
            nn.GELU(),
            nn.Linear(config.mlp_ratio * width, width),
        )

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, H, W, 3, heads, D] -> [B, H, W, heads, D]"""
        return axial_attention_packed(qkv, self.axis, causal=self.causal, backend=self.backend)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`attend` stands in for the block's own attention where keys and values are cached."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        x = x + self.merge((attend or self.attend)(qkv).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class GCRL(nn.Module):
    """Hybrid generative-contrastive axial transformer (Kim, Kim and Lee 2021, arXiv 2106.06162).

    The outer stage (rows unmasked, columns causal, in turn) encodes; the inner stage (causal rows)
    decodes from everything before a pixel in raster order (Ho et al. 2019, arXiv 1912.12180).
    Tokens are int64 [B, H, W], indices of palette colours; H, W are the configuration's grid.
    Other shapes raise ValueError, other dtypes TypeError.
    """

    def __init__(self, config: ModelConfig, *, backend: str | None = None) -> None:
        super().__init__()
        height, columns = config.grid
        width = config.width
        self.config, self.backend = config, backend
        self.embed = nn.Embedding(config.colors, width)
        self.row_position = nn.Parameter(torch.empty(height, 1, width))
        self.column_position = nn.Parameter(torch.empty(columns, width))
        self.outer = nn.ModuleList(
            Block(config, ALONG_ROWS, causal=False, backend=backend)
            if layer % 2 == 0
            else Block(config, DOWN_COLUMNS, causal=True, backend=backend)
            for layer in range(config.outer_layers)
        )
        self.outer_norm = nn.LayerNorm(width)
        self.inner = nn.ModuleList(
            Block(config, ALONG_ROWS, causal=True, backend=backend)
            for _ in range(config.inner_layers)
        )
        self.inner_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.colors)
        self.projection = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.projection_dim),
        )
        self._initialise()

    def _initialise(self) -> None:
        """Positions begin as sinusoids, by which a neighbour can be found from the first step.

        Weights are normal of deviation 1/sqrt(inputs), smaller by the square root of how many write
        to the residual where a block does.
        """
        height, columns = self.config.grid
        half = self.config.width // 2
        with torch.no_grad():
            self.embed.weight.normal_(std=0.5)
            self.row_position.zero_()[:, 0, :half] = _sinusoids(height, half)
            self.column_position.zero_()[:, half:] = _sinusoids(columns, self.config.width - half)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.02)
        blocks = [*self.outer, *self.inner]
        with torch.no_grad():
            for block in blocks:
                for linear in (block.merge, block.mlp[-1]):
                    linear.weight /= math.sqrt(2 * len(blocks))

    def position(self) -> Tensor:
        """[H, W, C]"""
        return self.row_position + self.column_position

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> the encoding [B, H, W, C]."""
        self.check_tokens("tokens", tokens)
        return self.outer_norm(self._outer(self.embed(tokens)))

    def features(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> [B, C], the encoding's mean over the pixels."""
        return self.encode(tokens).mean((1, 2))

    @property
    def layer_names(self) -> list[str]:
        """Of what `layers` returns."""
        outer = [f"outer {layer + 1}" for layer in range(len(self.outer))]
        inner = [f"inner {layer + 1}" for layer in range(len(self.inner))]
        return ["embedding", *outer, "encoding", *inner]

    def layers(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> [B, layers, C]: each layer's output, its mean over the pixels."""
        self.check_tokens("tokens", tokens)
        embedded = self.embed(tokens)
        u = embedded + self.position()  # [B, H, W, C]
        outputs = [u]
        for block in self.outer:
            u = block(u)
            outputs.append(u)
        outputs.append(self.outer_norm(u))
        t = self._shifted(embedded, u)
        for block in self.inner:
            t = block(t)
            outputs.append(t)
        return torch.stack([output.mean((1, 2)) for output in outputs], 1)

    def project(self, features: Tensor) -> Tensor:
        """Features [B, C] -> z [B, P], not normalised."""
        return self.projection(features)

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> [B, H, W, K], each given the pixels before it in raster order."""
        return self.head(self._predict(tokens))

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> log p(image), float32 [B]: nats, summed over all pixels."""
        nats = linear_color_cross_entropy(
            self._predict(tokens), self.head.weight, tokens,
            bias=self.head.bias, reduction="none", backend=self.backend,
        )  # fmt: skip
        return -nats.sum((1, 2))

    def forward(
        self,
        weak: Tensor,
        strong: Tensor | None,
        objective: ObjectiveConfig,
        group: ProcessGroup | None = None,
    ) -> Losses:
        """The losses of weak and strong views, tokens [B, H, W].

        A part whose weight is zero is not computed and is zero; with beta zero, strong may be None.
        `group` contrasts with every rank's views (see gcrl_kernels.nt_xent).
        """
        self.check_tokens("weak", weak)
        generative = contrastive = torch.zeros((), device=weak.device)
        views = weak
        if objective.beta:
            strong = self.check_tokens("strong", strong)
            if strong.shape != weak.shape:
                raise ValueError(
                    f"strong: expected as many images as weak, {len(weak)}, got {len(strong)}"
                )
            views = torch.cat((weak, strong))
        embedded = self.embed(views)
        encoded = self._outer(embedded)
        if objective.beta:
            z = self.project(self.outer_norm(encoded).mean((1, 2)))
            contrastive = nt_xent(
                *z.chunk(2), temperature=objective.temperature, group=group, backend=self.backend
            )
        if objective.alpha:
            hidden = self._inner(embedded[: len(weak)], encoded[: len(weak)])
            generative = linear_color_cross_entropy(
                hidden, self.head.weight, weak, bias=self.head.bias,
                mask=None if objective.score_first_pixel else _all_but_first(weak),
                backend=self.backend,
            )  # fmt: skip
        return Losses(generative, contrastive)

    def check_tokens(self, name: str, tokens: Tensor | None) -> Tensor:
        """The tokens, int64 [B, H, W] on the model's grid; raises TypeError or ValueError."""
        height, columns = self.config.grid
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: expected an int64 tensor, got {type(tokens).__name__}")
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64 tokens, got {tokens.dtype}")
        if tokens.dim() != 3 or tokens.shape[1:] != (height, columns):
            raise ValueError(
                f"{name}: expected tokens [B, {height}, {columns}], got {list(tokens.shape)}"
            )
        return tokens

    def _predict(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> what the head reads, [B, H, W, C]."""
        self.check_tokens("tokens", tokens)
        embedded = self.embed(tokens)
        return self._inner(embedded, self._outer(embedded))

    def _outer(self, embedded: Tensor) -> Tensor:
        u = embedded + self.position()  # [B, H, W, C]
        for block in self.outer:
            u = block(u)
        return u

    def _inner(self, embedded: Tensor, encoded: Tensor) -> Tensor:
        t = self._shifted(embedded, encoded)
        for block in self.inner:
            t = block(t)
        return self.inner_norm(t)

    def _shifted(self, embedded: Tensor, encoded: Tensor) -> Tensor:
        """What the inner stage may see of each pixel, [B, H, W, C]: those before it."""
        left = F.pad(embedded[:, :, :-1], (0, 0, 1, 0))
        above = F.pad(encoded[:, :-1], (0, 0, 0, 0, 1, 0))
        return left + above + self.position()


def _sinusoids(length: int, features: int) -> Tensor:
    """[length, features]: a sine and a cosine of each frequency, as in Vaswani et al. 2017.

    The periods go from 4 positions to 4 lengths; the amplitude is the embedding's deviation.
    """
    frequencies = 0.5 * math.pi * length ** -torch.linspace(0, 1, (features + 1) // 2)
    angles = torch.arange(length)[:, None] * frequencies
    return 0.5 * torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :features]


def _all_but_first(tokens: Tensor) -> Tensor:
    """True, [B, H, W], but for the first pixel of each image."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0, 0] = False
    return mask
