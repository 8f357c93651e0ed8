"""Contenders of axial attention: functions of q, k, v [B, H, W, heads, D], contiguous.

The peers see free views, nothing is copied for them: along rows an image's rows are more of the
batch, [B·H, W, heads, D]; down columns they are more heads, [B, H, W·heads, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contest import PLAIN, Contender, Function, Unavailable
from benchmarks.measure import DEVICE
from benchmarks.peers import compiled, load, needs_gpu, ours
from gcrl_kernels import axial_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_views(attention: Attention, axis: int, *, heads_first: bool) -> Function:
    """An attention over [batch, N, heads, D] (or [batch, heads, N, D]) as one along an axis."""

    def view(tensor: Tensor) -> Tensor:
        tensor = tensor.flatten(0, 1) if axis == 1 else tensor.flatten(2, 3)
        return tensor.transpose(1, 2) if heads_first else tensor

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(view(q), view(k), view(v))
        return (out.transpose(1, 2) if heads_first else out).reshape(q.shape)

    return function


def _ours(case, backend: str) -> Function:
    return lambda q, k, v: axial_attention(q, k, v, case.axis, causal=case.causal, backend=backend)


def _plain(case) -> Function:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * case.features**-0.5) @ k.mT
        if case.causal:
            future = torch.ones(case.length, case.length, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(future.triu(1), -torch.inf)
        return scores.softmax(-1) @ v

    return on_views(attention, case.axis, heads_first=True)


def _sdpa(backend: SDPBackend) -> Contender:
    def build(case) -> Function:
        if DEVICE == "cpu" and backend not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            raise Unavailable(f"SDPA's {backend.name} needs a CUDA GPU")

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        return on_views(attention, case.axis, heads_first=True)

    return Contender(f"SDPA {backend.name.lower().replace('_attention', '')}", build)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex(case) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = case.length
    mask = (
        create_block_mask(_causal, None, None, length, length, device=DEVICE)
        if case.causal
        else None
    )

    # Alone: compiled together with what makes the views, it fails on a CPU.
    flex = compiled(flex_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if DEVICE == "cpu" and torch.is_grad_enabled():
            raise Unavailable("FlexAttention has no backward on a CPU")
        return flex(q, k, v, block_mask=mask)

    return on_views(attention, case.axis, heads_first=True)


def _flash(case) -> Function:
    needs_gpu("flash-attn")
    flash = load("flash_attn", "flash-attn").flash_attn_func
    return on_views(
        lambda q, k, v: flash(q, k, v, causal=case.causal), case.axis, heads_first=False
    )


def _flash3(case) -> Function:
    needs_gpu("flash-attn 3")
    flash = load("flash_attn_interface", "flash-attn 3").flash_attn_func
    return on_views(
        lambda q, k, v: flash(q, k, v, causal=case.causal), case.axis, heads_first=False
    )


def _xformers(case) -> Function:
    needs_gpu("xformers")
    ops = load("xformers.ops", "xformers")
    bias = ops.LowerTriangularMask() if case.causal else None
    return on_views(
        lambda q, k, v: ops.memory_efficient_attention(q, k, v, attn_bias=bias),
        case.axis,
        heads_first=False,
    )


class _Together:
    """Keys and values that are projected already, for a module that asks for them in one tensor."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.parts = k, v

    def chunk(self, parts: int, dim: int) -> tuple[Tensor, Tensor]:
        return self.parts


class _Taken(torch.nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> _Together:
        return _Together(*pair)


def _axial_attention_package(case) -> Function:
    """Its permutations, copies and attention; identities stand in for its projections."""
    package = load("axial_attention.axial_attention", "axial-attention")
    if case.causal:
        raise Unavailable("axial-attention has no causal mask")
    attention = package.SelfAttention(case.heads * case.features, case.heads, case.features)
    attention.to_q, attention.to_out = torch.nn.Identity(), torch.nn.Identity()
    attention.to_kv = _Taken()
    permutation = package.calculate_permutations(2, 3)[case.axis]
    box = package.PermuteToFrom(permutation, attention)

    def rows(tensor: Tensor) -> Tensor:  # as the package lays its input out
        tensor = tensor.flatten(-2).permute(*box.permutation).contiguous()
        return tensor.reshape(-1, *tensor.shape[-2:])

    return lambda q, k, v: box(q.flatten(-2), kv=(rows(k), rows(v))).view(q.shape)


CONTENDERS = [
    *ours("axial_attention", _ours),
    Contender(PLAIN, _plain),
    Contender("torch.compile", lambda case: compiled(_plain(case))),
    *(
        _sdpa(backend)
        for backend in (
            SDPBackend.MATH,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        )
    ),
    Contender("FlexAttention", _flex),
    Contender("axial-attention, which copies", _axial_attention_package),
    Contender("flash-attn", _flash),
    Contender("flash-attn 3", _flash3),
    Contender("xformers", _xformers),
]
