"""Every differentiable public function on small inputs, for tests of what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gcrl_kernels as kernels
from gcrl_kernels.backends import unavailable

BACKENDS = [name for name in ("reference", "cpu") if unavailable(name) is None]


class Case(NamedTuple):
    """A function of tensors that all may require a gradient, and what it is called with."""

    name: str
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, **options: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            torch.rand(shape, generator=generator).add(0.1).to(**options).requires_grad_()
            for shape in self.shapes
        ]


def _cases(backend: str | None) -> list[Case]:
    pixels = torch.randint(0, 256, (6, 3), generator=torch.Generator().manual_seed(2))
    pixels = pixels.to(torch.uint8)
    palette = torch.arange(15).view(5, 3) * 17
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    options: dict[str, Any] = {"backend": backend}

    def here(like: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(like.device) for tensor in tensors]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return kernels.axial_attention(q, k, v, 0, bias=bias, causal=True, **options)

    def attend_packed(qkv: Tensor) -> Tensor:
        return kernels.axial_attention_packed(qkv, 1, **options)

    def colors(logits: Tensor) -> Tensor:
        return kernels.color_cross_entropy(logits, *here(logits, pixels, palette), **options)

    def colors_in_place(logits: Tensor) -> Tensor:
        targets = here(logits, pixels, palette)
        return kernels.color_cross_entropy(logits * 2, *targets, inplace_backward=True, **options)

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        targets = here(hidden, pixels, palette)
        return kernels.linear_color_cross_entropy(hidden, weight, *targets, bias=bias, **options)

    def linear_each(hidden: Tensor, weight: Tensor) -> Tensor:
        targets = here(hidden, pixels, palette)
        return kernels.linear_color_cross_entropy(
            hidden, weight, *targets, reduction="none", **options
        )

    def nt_xent(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        return kernels.nt_xent(z0, z1, temperature=tau, **options)

    def dcl(z0: Tensor, z1: Tensor) -> Tensor:
        return kernels.dcl(z0, z1, reduction="none", **options)

    def supcon(z: Tensor) -> Tensor:
        return kernels.supcon(z, *here(z, labels), **options)

    def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return kernels.info_nce(a, b, logit_scale=scale, **options)

    image, views = (2, 3, 4, 2, 8), (6, 4)
    return [
        Case("axial_attention", attend, (image, image, image, (2, 3, 3))),
        Case("axial_attention_packed", attend_packed, ((2, 3, 4, 3, 2, 8),)),
        Case("color_cross_entropy", colors, ((6, 5),)),
        Case("color_cross_entropy", colors_in_place, ((6, 5),)),
        Case("linear_color_cross_entropy", linear, (views, (5, 4), (5,))),
        Case("linear_color_cross_entropy", linear_each, (views, (5, 4))),
        Case("nt_xent", nt_xent, (views, views, ())),
        Case("dcl", dcl, (views, views)),
        Case("supcon", supcon, (views,)),
        Case("info_nce", info_nce, (views, views, ())),
    ]


CASES = {
    f"{case.call.__name__}-{backend}": case for backend in BACKENDS for case in _cases(backend)
}
CHOSEN = {case.call.__name__: case for case in _cases(None)}


def gradients(case: Case, inputs: list[Tensor], output: Tensor) -> list[Tensor]:
    """Of a sum of the output with uneven weights."""
    weights = torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output)
    found = list(torch.autograd.grad((output * weights).sum(), inputs))
    assert all(gradient.is_meta or gradient.abs().max() > 0 for gradient in found)
    return found
