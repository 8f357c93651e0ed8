"""Contenders of the nearest colour and of the cross-entropy with it as target, [M] positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import PLAIN, Contender, Function, Unavailable
from benchmarks.measure import DEVICE
from benchmarks.peers import compiled, load, needs_gpu, ours
from gcrl_kernels import color_cross_entropy, linear_color_cross_entropy, quantize_colors


def _our_nearest(case, backend: str) -> Function:
    return lambda pixels, palette: quantize_colors(pixels, palette, backend=backend)


def _nearest_in_pytorch(case) -> Function:
    return lambda pixels, palette: torch.cdist(pixels.float(), palette.float()).argmin(1)


def _by_product(case) -> Function:
    """|x - c|² less |x|², which all colours share: a matrix product and no square root."""

    def nearest(pixels: Tensor, palette: Tensor) -> Tensor:
        x, c = pixels.float(), palette.float()
        return (c.square().sum(1) / 2 - x @ c.T).argmin(1)

    return nearest


def _one_expression(case) -> Function:
    """Channel by channel, so that torch.compile makes one loop of distances and minimum."""

    def nearest(pixels: Tensor, palette: Tensor) -> Tensor:
        x, c = pixels.float().unbind(1), palette.float().unbind(1)
        squares = [(x[i][:, None] - c[i][None, :]).square() for i in range(3)]
        return (squares[0] + squares[1] + squares[2]).argmin(1)

    return nearest


def _faiss(case) -> Function:
    """Its inputs are made ready before: it knows float32 arrays alone."""
    if DEVICE != "cpu":
        raise Unavailable("faiss-cpu works on the CPU")
    faiss = load("faiss", "faiss-cpu")
    pixels, palette = (tensor.float().numpy() for tensor in case.inputs())
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(3)
    index.add(palette)
    return lambda *_: torch.from_numpy(index.search(pixels, 1)[1][:, 0])


QUANTIZE = [
    *ours("quantize_colors", _our_nearest),
    Contender(PLAIN, _nearest_in_pytorch),
    Contender("PyTorch, matrix product", _by_product),
    Contender("torch.compile", lambda case: compiled(_one_expression(case))),
    Contender("FAISS", _faiss),
]


def _our_logits(case, backend: str) -> Function:
    pixels, palette = case.pixels()
    return lambda logits: color_cross_entropy(logits, pixels, palette, backend=backend)


def _plain_logits(case) -> Function:
    tokens = case.tokens()
    return lambda logits: F.cross_entropy(logits.float(), tokens)


def _liger_logits(case) -> Function:
    needs_gpu("liger-kernel")
    loss = load("liger_kernel.transformers", "liger-kernel").LigerCrossEntropyLoss()
    tokens = case.tokens()
    # It writes the gradient over the logits, so it is given a copy.
    return lambda logits: loss(logits.clone(), tokens)


def _quack_logits(case) -> Function:
    needs_gpu("quack")
    cross_entropy = load("quack", "quack-kernels").cross_entropy
    tokens = case.tokens()
    return lambda logits: cross_entropy(logits, tokens, reduction="mean")


LOGITS = [
    *ours("color_cross_entropy", _our_logits),
    Contender(PLAIN, _plain_logits),
    Contender("torch.compile", lambda case: compiled(_plain_logits(case))),
    Contender("Liger", _liger_logits),
    Contender("quack", _quack_logits),
]


def _our_linear(case, backend: str) -> Function:
    pixels, palette = case.pixels()
    return lambda hidden, weight: linear_color_cross_entropy(
        hidden, weight, pixels, palette, backend=backend
    )


def _plain_linear(case) -> Function:
    tokens = case.tokens()
    return lambda hidden, weight: F.cross_entropy((hidden @ weight.T).float(), tokens)


def _torch_linear(case, **chunking: Any) -> Function:
    """F.linear_cross_entropy: with no options the logits are whole, else in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"PyTorch {torch.__version__} has no F.linear_cross_entropy")
    tokens = case.tokens()
    options: Any = None
    if chunking:
        options = torch.nn.LinearCrossEntropyOptions(**chunking)
    return lambda hidden, weight: F.linear_cross_entropy(hidden, weight, tokens, options=options)


def _liger_linear(case, accumulate: torch.dtype | None) -> Function:
    needs_gpu("liger-kernel")
    module = load("liger_kernel.transformers", "liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
    tokens = case.tokens()
    return lambda hidden, weight: loss(weight, hidden, tokens)


def _cut_cross_entropy(case) -> Function:
    """Without its filter, which drops small gradients; on a CPU it has torch.compile alone."""
    linear_cross_entropy = load("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    tokens = case.tokens()
    options = {"impl": "cce", "filter_eps": None} if DEVICE == "cuda" else {"impl": "torch_compile"}
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, tokens, **options)


def _quack_linear(case) -> Function:
    needs_gpu("quack")
    module = load("quack.linear_cross_entropy", "quack-kernels")
    tokens = case.tokens()
    return lambda hidden, weight: module.chunked_linear_cross_entropy(hidden, weight, tokens)


class _Products(torch.autograd.Function):
    """The matrix products of a linear layer's forward and backward, with nothing in between."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return torch.zeros((), device=hidden.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden


LINEAR = [
    *ours("linear_color_cross_entropy", _our_linear),
    Contender(PLAIN, _plain_linear),
    Contender("torch.compile", lambda case: compiled(_plain_linear(case))),
    Contender("F.linear_cross_entropy", _torch_linear),
    Contender(
        "F.linear_cross_entropy, chunked",
        lambda case: _torch_linear(case, chunking_method="auto"),
    ),
    Contender(
        "F.linear_cross_entropy, chunks of 8192",
        lambda case: _torch_linear(case, batch_chunk_size=8192),
    ),
    Contender("Liger", lambda case: _liger_linear(case, None)),
    Contender("Liger, float32 sums", lambda case: _liger_linear(case, torch.float32)),
    Contender("Cut Cross-Entropy", _cut_cross_entropy),
    Contender("quack", _quack_linear),
    Contender("bare products", lambda case: _Products.apply, yardstick=True),
]
