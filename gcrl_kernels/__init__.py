"""Fused kernels for hybrid generative-contrastive representation learning (arXiv 2106.06162)."""

from gcrl_kernels.axial_attention import axial_attention, axial_attention_packed
from gcrl_kernels.backends import BackendUnavailableError
from gcrl_kernels.color_cross_entropy import (
    color_cross_entropy,
    fit_palette,
    linear_color_cross_entropy,
    quantize_colors,
)
from gcrl_kernels.contrastive import dcl, info_nce, nt_xent, supcon
from gcrl_kernels.installation import warn_if_uncompiled

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "axial_attention",
    "axial_attention_packed",
    "color_cross_entropy",
    "dcl",
    "fit_palette",
    "info_nce",
    "linear_color_cross_entropy",
    "nt_xent",
    "quantize_colors",
    "supcon",
]

warn_if_uncompiled()
