"""The kernels as modules, for models that are put together from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gcrl_kernels.axial_attention import axial_attention_packed
from gcrl_kernels.checks import value_error
from gcrl_kernels.color_cross_entropy import color_cross_entropy, linear_color_cross_entropy
from gcrl_kernels.contrastive import nt_xent

__all__ = [
    "AxialSelfAttention",
    "ColorCrossEntropyLoss",
    "LinearColorCrossEntropyLoss",
    "NTXentLoss",
]


class AxialSelfAttention(nn.Module):
    """Multi-head self-attention along one axis of a grid: [B, *grid, width] -> [B, *grid, width].

    Args:
        width: features of each position.
        heads: attention heads; they divide the width.
        axis: the grid dimension to attend along, as in `axial_attention`.
        causal: a position attends to itself and those before it.
        projection_bias: whether the two projections have a bias.
        backend: of the kernel.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        axis: int,
        *,
        causal: bool = False,
        projection_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise value_error("heads", f"a divisor of the width {width}", heads)
        self.heads, self.axis, self.causal, self.backend = heads, axis, causal, backend
        self.qkv = nn.Linear(width, 3 * width, bias=projection_bias)
        self.out = nn.Linear(width, width, bias=projection_bias)

    def forward(
        self,
        x: Tensor,  # [B, *grid, width]
        *,
        bias: Tensor | None = None,  # [heads, N, N]
        mask: Tensor | None = None,  # bool [B, *grid]
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, *grid, 3, heads, D]
        attended = axial_attention_packed(
            qkv, self.axis, causal=self.causal, bias=bias, mask=mask, backend=self.backend
        )
        return self.out(attended.flatten(-2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, axis={self.axis}, causal={self.causal}"


class _ColorLoss(nn.Module):
    """The options that both forms of the colour cross-entropy share."""

    palette: Tensor | None

    def __init__(
        self,
        palette: Tensor | None = None,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        return_z_loss: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("palette", palette)
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "return_z_loss": return_z_loss,
            "backend": backend,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ColorCrossEntropyLoss(_ColorLoss):
    """`color_cross_entropy` with its palette and options: forward(logits, pixels, mask=None)."""

    def forward(
        self, logits: Tensor, pixels: Tensor, mask: Tensor | None = None
    ) -> Tensor | Any:  # with a return_ flag a tuple
        return color_cross_entropy(logits, pixels, self.palette, mask=mask, **self.options)


class LinearColorCrossEntropyLoss(_ColorLoss):
    """`linear_color_cross_entropy`, likewise: forward(hidden, weight, pixels, bias, mask)."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        pixels: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | Any:  # with a return_ flag a tuple
        return linear_color_cross_entropy(
            hidden, weight, pixels, self.palette, bias=bias, mask=mask, **self.options
        )


class NTXentLoss(nn.Module):
    """NT-Xent between the views out0 and out1, [N, D]; takes the place of lightly.loss.NTXentLoss.

    Args:
        temperature: of the similarities; its absolute value at least 1e-8.
        memory_bank_size: how many embeddings of earlier batches are kept, or (that, D). With a
            memory bank the anchors are out0's rows, their positives out1's, and their negatives the
            bank alone, as lightly does. The bank starts with random directions; a batch enters it
            after its loss, where out0 requires a gradient.
        gather_distributed: compare with the views of every process of the default group.

    Raises:
        ValueError: a temperature too near 0; a memory bank together with gather_distributed.
    """

    bank: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if abs(temperature) < 1e-8:
            raise value_error("temperature", "an absolute value of at least 1e-8", temperature)
        sizes = (
            (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        )
        if len(sizes) not in (1, 2) or min(sizes) < 0:
            raise value_error(
                "memory_bank_size", "a size, or a size and a dimension", memory_bank_size
            )
        if gather_distributed and not dist.is_available():
            raise value_error("gather_distributed", "torch.distributed in this PyTorch", True)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.bank_size, self.next_row = sizes[0], 0
        bank = torch.empty(0) if len(sizes) == 1 else torch.randn(sizes)
        self.register_buffer("bank", normalize(bank, dim=-1) if bank.dim() == 2 else bank)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.bank_size == 0:
            distributed = self.gather_distributed and dist.is_initialized()
            group = dist.group.WORLD if distributed else None
            return nt_xent(out0, out1, temperature=self.temperature, group=group)
        anchors, positives = normalize(out0, dim=1), normalize(out1, dim=1)
        if self.bank.dim() == 1:
            shape = (self.bank_size, out1.shape[1])
            self.bank = normalize(torch.randn(shape, device=out1.device, dtype=out1.dtype), dim=1)
        positive = (anchors * positives).sum(1, keepdim=True)
        negative = anchors @ self.bank.clone().to(anchors.dtype).T
        logits = torch.cat([positive, negative], 1) / self.temperature  # [N, 1 + bank_size]
        if out0.requires_grad:
            self._remember(positives.detach())
        return cross_entropy(
            logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        )

    @torch.no_grad()
    def _remember(self, rows: Tensor) -> None:
        """Overwrite the oldest rows of the bank; as in lightly, what is past its end is dropped."""
        kept = rows[: self.bank_size - self.next_row].to(self.bank.dtype)
        self.bank[self.next_row : self.next_row + len(kept)] = kept
        self.next_row = (self.next_row + len(kept)) % self.bank_size

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, memory_bank_size={self.bank_size}"
