"""The kernels as modules, for models that are put together from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from gcrl_kernels import checks
from gcrl_kernels.axial_attention import axial_attention_packed
from gcrl_kernels.backends import choose
from gcrl_kernels.color_cross_entropy import color_cross_entropy, linear_color_cross_entropy
from gcrl_kernels.contrastive import check_views, inverse, nt_xent
from gcrl_kernels.contrastive.ops import cannot, differentiable_block_lse
from gcrl_kernels.contrastive.reference import OTHERS
from gcrl_kernels.operators import accumulation_dtype, check_reverse_mode

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
        TypeError, ValueError: width or heads is no integer, or the heads do not divide the width.
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
        width, heads = checks.integer("width", width), checks.integer("heads", heads)
        if heads < 1 or width < 1 or width % heads:
            raise checks.value_error("heads", f"a divisor of the width {width}", heads)
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
        checks.check_floating("x", x)
        width = self.qkv.in_features
        if not 3 <= x.dim() <= 5 or x.shape[-1] != width:
            layout = f"[B, *grid, width = {width}] with a grid of 1 to 3 dimensions"
            raise checks.value_error("x", layout, checks.shape(x))
        checks.check_same_device("x", x, "the projection", self.qkv.weight)
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
        if palette is not None:
            checks.check_tensor("palette", palette)
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
            after its loss, where out0 requires a gradient. The state_dict leaves it out, as
            lightly's does.
        gather_distributed: compare with the views of every process of the default group; with a
            memory bank, whose rows remain the only negatives, every process's batch enters it.

    The loss is float32 (float64 for float64 views).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
    """

    bank: Tensor  # [size, D], or [0] until the first batch tells D
    next_row: Tensor  # int64, where the next batch enters

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        temperature = checks.number("temperature", temperature)
        if abs(temperature) < 1e-8:
            raise checks.value_error(
                "temperature", "an absolute value of at least 1e-8", temperature
            )
        given = memory_bank_size if isinstance(memory_bank_size, Sequence) else [memory_bank_size]
        sizes = [checks.integer("memory_bank_size", size) for size in given]
        if len(sizes) not in (1, 2) or min(sizes) < 0:
            raise checks.value_error(
                "memory_bank_size", "a size, or a size and a dimension", memory_bank_size
            )
        checks.check_flag("gather_distributed", gather_distributed)
        if gather_distributed and not dist.is_available():
            raise checks.value_error(
                "gather_distributed", "torch.distributed in this PyTorch", gather_distributed
            )
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.bank_size = sizes[0]
        with torch.inference_mode(False):  # else no batch could be trained against them
            bank = torch.empty(0) if len(sizes) == 1 else normalize(torch.randn(sizes), dim=1)
            next_row = torch.zeros((), dtype=torch.long)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("next_row", next_row, persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        out0, out1 = check_views(out0, out1, "out0", "out1")
        if self.bank_size == 0:
            return nt_xent(out0, out1, temperature=self.temperature, group=self._group())
        return self._against_bank(out0, out1)

    def _group(self) -> dist.ProcessGroup | None:
        distributed = self.gather_distributed and dist.is_initialized()
        return dist.group.WORLD if distributed else None

    def _against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        dtype = accumulation_dtype(out0.dtype)
        anchors, positives = (normalize(views.to(dtype), dim=1) for views in (out0, out1))
        if self.bank.dim() == 1:
            self._begin_bank(out1, dtype)
        bank = self.bank.to(anchors)
        checks.check_shape("out1", out1, (len(out1), bank.shape[1]), "[N, D of the memory bank]")
        backend = choose("nt_xent", None, anchors, lambda name: cannot(name, dtype))
        scale, value = inverse("temperature", self.temperature, "out0", anchors)
        check_reverse_mode("NTXentLoss", anchors, positives, scale)
        lse, residual = differentiable_block_lse(
            anchors, bank, scale, value, OTHERS, None, backend
        )  # [N]
        positive = (anchors * positives).sum(1) * (value if scale is None else scale)
        if out0.requires_grad:
            self._remember(positives.detach())
        above = (lse - positive) + residual.detach()
        # log(exp(lse) + exp(positive)) - positive; softplus is another function beyond 20
        return above.logaddexp(above.new_zeros(())).mean()

    @torch.inference_mode(False)  # else no later batch could be trained against it
    @torch.no_grad()
    def _begin_bank(self, like: Tensor, dtype: torch.dtype) -> None:
        rows = torch.randn(self.bank_size, like.shape[1], device=like.device, dtype=dtype)
        self.bank = normalize(rows, dim=1)
        self.next_row = torch.zeros_like(self.next_row, device=like.device)

    @torch.no_grad()
    def _remember(self, rows: Tensor) -> None:
        """Replace the oldest rows of the bank; as in lightly, what is past its end is dropped.

        The old bank stays as it is: a backward still needs it.
        """
        group = self._group()
        if group is not None:
            rows = _rows_of_all(rows, group)
        rows = rows.to(self.bank)
        # Computed on the device, in one shape: nothing waits for it, and no batch compiles anew.
        # What has no place repeats the row in the last one.
        last = self.bank_size - 1 - self.next_row
        kept = torch.arange(len(rows), device=rows.device).minimum(last)
        self.bank = self.bank.index_put((self.next_row + kept,), rows[kept])
        self.next_row = (self.next_row + kept[-1] + 1) % self.bank_size

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, memory_bank_size={self.bank_size}"


@torch.compiler.disable
def _rows_of_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    from gcrl_kernels.contrastive.distributed import Call, all_gather, check_same_call

    call = Call(len(rows), rows.shape[1], str(rows.dtype))
    check_same_call("out0, out1", call, group, rows.device)
    return all_gather(rows, group)
