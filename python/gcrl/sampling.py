"""Drawing images from a model, pixel by pixel in raster order, with cached keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from gcrl.model import DOWN_COLUMNS, GCRL


class KeyValueCache:
    """Causal attention along an axis of `length`, one step at a time."""

    def __init__(self, length: int) -> None:
        self.length, self.step = length, 0
        self.keys = self.values = torch.empty(0)  # [B, P * heads, length, D] from the first step on

    def attend(self, qkv: Tensor) -> Tensor:
        """The next step at P places side by side, [B, 1, P, 3, heads, D] -> [B, 1, P, heads, D]."""
        places, heads = qkv.shape[2], qkv.shape[4]
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in qkv.unbind(3))
        if self.step == 0:
            self.keys = k.new_empty(*k.shape[:2], self.length, k.shape[3])
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, self.step] = k[:, :, 0]
        self.values[:, :, self.step] = v[:, :, 0]
        self.step += 1
        attended = F.scaled_dot_product_attention(
            q, self.keys[:, :, : self.step], self.values[:, :, : self.step]
        )
        return attended.transpose(1, 2).unflatten(2, (places, heads))


def sample(
    model: GCRL,
    count: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw `count` images: tokens, int64 [count, H, W], on the model's device.

    The images are exact draws from the model at temperature 1; 0 takes the likeliest colour of each
    pixel. The encoder runs once for each finished row, on that row alone. The draw is the argmax
    of logits + temperature * noise; `noise`, [count, H, W, K], is Gumbel noise to use in place of
    the generator's (by default torch's global one). Raises ValueError for a negative count or
    temperature and for noise of another shape.
    """
    if count < 0:
        raise ValueError(f"count: expected 0 or more images, got {count}")
    tokens = torch.zeros(
        count, *model.config.grid, dtype=torch.int64, device=model.head.weight.device
    )
    return complete(
        model, tokens, 0,
        temperature=temperature, generator=generator, noise=noise, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def complete(
    model: GCRL,
    tokens: Tensor,
    first_row: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw the rows from `first_row` on anew, given those above: tokens, int64 [B, H, W].

    Options as for `sample`. The noise of the rows that stay is drawn too: from the same seed, what
    `sample` drew completes to itself. Raises ValueError for a first row outside 0..H and as
    `sample` does, and ValueError or TypeError for tokens that are not int64 [B, H, W].
    """
    model.check_tokens("tokens", tokens)
    height, width = model.config.grid
    noise_shape = (len(tokens), height, width, model.config.colors)
    if not 0 <= first_row <= height:
        raise ValueError(f"first_row: expected a row from 0 to {height}, got {first_row}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if noise is not None and noise.shape != noise_shape:
        raise ValueError(f"noise: expected {list(noise_shape)}, got {list(noise.shape)}")

    tokens = tokens.clone()
    position = model.position()[:, None]  # [H, 1, W, C]
    caches = [KeyValueCache(height) for _ in model.outer]
    context = position[0].expand(len(tokens), -1, -1, -1)  # [B, 1, W, C]: position + the row above
    for row in tqdm(range(height), desc="sampling", unit="row", disable=not progress):
        if noise is None:
            row_noise = _gumbel((len(tokens), width, model.config.colors), tokens.device, generator)
        else:
            row_noise = noise[:, row].to(tokens.device)
        if row >= first_row:
            tokens[:, row] = _draw_row(model, context, temperature * row_noise)
        if row + 1 < height:
            encoded = _encode_row(model, tokens[:, row], position[row], caches)
            context = encoded + position[row + 1]
    return tokens


def _draw_row(model: GCRL, context: Tensor, noise: Tensor) -> Tensor:
    """What the inner stage knows of a row beforehand, [B, 1, W, C] -> its tokens, [B, W]."""
    caches = [KeyValueCache(context.shape[2]) for _ in model.inner]
    drawn: list[Tensor] = []
    for column in range(context.shape[2]):
        t = context[:, :, column, None]  # [B, 1, 1, C]
        if drawn:
            t = t + model.embed(drawn[-1])[:, None, None]
        for block, cache in zip(model.inner, caches, strict=True):
            t = block(t, cache.attend)
        logits = model.head(model.inner_norm(t))[:, 0, 0]  # [B, K]
        drawn.append((logits + noise[:, column]).argmax(-1))
    return torch.stack(drawn, 1)


def _encode_row(
    model: GCRL, tokens: Tensor, position: Tensor, caches: list[KeyValueCache]
) -> Tensor:
    """The outer stage on the next row, tokens [B, W], given the cached rows above: [B, 1, W, C]."""
    u = model.embed(tokens)[:, None] + position
    for block, cache in zip(model.outer, caches, strict=True):
        u = block(u, cache.attend if block.axis == DOWN_COLUMNS else None)
    return u


def _gumbel(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Standard Gumbel noise, float32, on the device; drawn on the generator's own."""
    source = generator.device if generator else device
    exponential = torch.empty(shape, device=source).exponential_(generator=generator)
    # float32 draws are multiples of about 2**-24; a zero among them would always win
    return exponential.clamp_(min=2.0**-24).log_().neg_().to(device)
