"""What the fuzzer draws: calls whose arguments are right, and one argument that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BAD = (torch.nan, torch.inf, -torch.inf)


class Call(NamedTuple):
    """A call by names, and what its rounding may amount to.

    `amplified` is by how much rounding of the inputs may grow in the results, relative to them: 0
    where every product and sum on the way is exact. `size` is that of the terms whose sums the
    results are.
    """

    function: str
    arguments: dict[str, Any]
    amplified: float = 0.0
    size: float = 1.0

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        return f"{self.function}({given})"


def shown(value: Any) -> str:
    """A tensor with its dtype, its strides and its first values."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.100}"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return f"<{type(value).__name__} {value.layout} {value.dtype}, nested: {value.is_nested}>"
    place = f"{str(value.dtype)[6:]}{list(value.shape)} strides {value.stride()}"
    if type(value) is not Tensor or value.device.type == "meta":
        return f"<{type(value).__name__} {place} on {value.device}>"
    if value.untyped_storage().nbytes() == 0:
        return f"<{place} without memory>"
    number = value.view(torch.uint8) if value.dtype == torch.bool else value
    return f"<{place} {number.flatten()[:24].tolist()}>"


class Draw:
    """Draws with short names, and tensors by the seeds that are drawn."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw

    def one(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def size(self, most: int, least: int = 0) -> int:
        return int(self.draw(st.integers(least, most)))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.size(2**31))

    def number(self, value: float) -> Any:
        """As Python has it, or NumPy."""
        return self.one(float, float, np.float64, np.float32)(value)

    def integer(self, value: int) -> Any:
        return self.one(int, int, np.int64, np.int32)(value)

    def floats(self, *shape: int, dtype: torch.dtype, exact: bool) -> Tensor:
        """Normal numbers, or eighths between -2 and 2, whose products and sums lose nothing."""
        generator = self.generator()
        if exact:
            return self.laid_out((torch.randint(-16, 17, shape, generator=generator) / 8).to(dtype))
        return self.laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.randint(low, high, shape, generator=self.generator())
        return self.laid_out(values.to(dtype))

    def mask(self, *shape: int) -> Tensor:
        """Some True, all or none; a byte of True may be any but 0."""
        mask = torch.rand(shape, generator=self.generator()) < self.one(0.0, 0.3, 0.7, 1.0)
        if self.flag():
            odd = torch.randint(1, 256, shape, generator=self.generator(), dtype=torch.uint8)
            mask = torch.where(mask, odd, 0).to(torch.uint8).view(torch.bool)
        return self.laid_out(mask)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values in other places of memory."""
        kind = self.one("as it is", "as it is", "turned", "apart", "misaligned", "repeated")
        if kind == "turned":
            order = tuple(reversed(range(tensor.dim())))
            return tensor.permute(order).contiguous().permute(order)
        if kind == "apart" and tensor.dim():
            larger = tensor.repeat_interleave(2, -1)
            return larger[..., ::2]
        if kind == "misaligned":
            memory = tensor.new_empty(tensor.numel() + 1)[1:]
            return memory.view(tensor.shape).copy_(tensor)
        if kind == "repeated" and tensor.dim() and len(tensor):
            return tensor[:1].expand(tensor.shape)
        return tensor

    def poison(self, tensor: Tensor, kept: Tensor) -> Tensor:
        """Not a number, or infinite, wherever `kept` is False."""
        odd = ~kept.view(kept.shape + (1,) * (tensor.dim() - kept.dim())).expand(tensor.shape)
        return torch.where(odd, torch.tensor(self.one(*BAD), dtype=tensor.dtype), tensor)


def axial_attention(d: Draw, packed: bool) -> Call:
    dtype, exact = d.one(*FLOATS), d.flag()
    grid = [d.size(6) if d.size(9) == 0 else d.size(5, 1) for _ in range(d.size(3, 1))]
    batch, heads, features = d.size(2, 1), d.size(2, 1), d.one(1, 2, 3, 8, 16)
    axis = d.size(len(grid) - 1)
    length = grid[axis]
    shape = (batch, *grid, heads, features)
    mask = d.mask(batch, *grid) if d.flag() else None
    q, k, v = (d.floats(*shape, dtype=dtype, exact=exact) for _ in range(3))
    if mask is not None and d.flag():
        kept = mask.view(torch.uint8) != 0
        k, v = d.poison(k, kept), d.poison(v, kept)
    scale = d.one(None, 0.25, -0.5, 1e-3, 0.0, 64.0, 2.0**20)
    arguments: dict[str, Any] = {"axis": d.integer(axis - d.one(0, len(grid)))}
    if packed:
        arguments = {"qkv": torch.stack([q, k, v], -3), **arguments}
    else:
        arguments = {"q": q, "k": k, "v": v, **arguments}
    arguments["causal"] = d.flag()
    arguments["scale"] = scale if scale is None else d.number(scale)
    largest = 4.0 * features * abs(features**-0.5 if scale is None else scale)
    bias_dtype, offset = d.one(dtype, torch.float32), d.one(0.0, 0.0, 1e4, 1e6, -1e6)
    if d.flag():
        offset = offset if bias_dtype in (torch.float32, torch.float64) else 0.0
        bias = d.floats(heads, length, length, dtype=bias_dtype, exact=exact)
        arguments["bias"] = bias if offset == 0 else bias + offset
        largest += abs(offset) + 4
    arguments |= {"mask": mask, "return_lse": d.flag()}
    power_of_two = scale in (0.25, -0.5, 0.0, 64.0, 2.0**20) or features in (1, 16)
    # beyond 2^17 or so the sums of eighths of eighths are rounded
    exact = exact and power_of_two and largest < 2.0**17
    size = 6.0 * features * max(1.0, abs(scale or 1.0)) * max(1, len(grid))
    name = "axial_attention_packed" if packed else "axial_attention"
    return Call(name, arguments, 0.0 if exact else largest, size)


def pixels_and_palette(d: Draw, *positions: int, colors: int) -> tuple[Tensor, Tensor]:
    if d.flag():
        low, high = d.one((0, 2), (0, 256), (-300, 300), (2**31 - 9, 2**31), (-(2**31), 2**31))
        pixels = d.integers(0, d.one(2, 256), *positions, 3, dtype=torch.uint8)
        dtype = d.one(*INTEGERS) if (low, high) == (0, 2) else torch.int32
        dtype = torch.int64 if dtype == torch.int32 and d.flag() else dtype
        return pixels, d.integers(low, high, colors, 3, dtype=dtype)
    exact, dtype = d.flag(), d.one(*FLOATS)
    pixels = d.floats(*positions, 3, dtype=dtype, exact=exact)
    palette = d.floats(colors, 3, dtype=d.one(dtype, torch.float32), exact=exact)
    if exact and d.flag():
        palette = d.integers(-2, 3, colors, 3, dtype=d.one(*INTEGERS[1:]))
    return pixels, palette


def quantize_colors(d: Draw) -> Call:
    positions = [d.size(5) for _ in range(d.size(3))]
    colors = d.one(1, 2, 3, 17, 40)
    pixels, palette = pixels_and_palette(d, *positions, colors=colors)
    if pixels.is_floating_point() and positions and d.flag():
        pixels = d.poison(pixels, d.mask(*positions).view(torch.uint8) != 0)
        pixels = torch.where(pixels.isinf(), torch.nan, pixels).to(pixels.dtype)
    if palette.is_floating_point() and colors > 1 and d.flag():
        palette = torch.cat([palette[:-1], torch.full_like(palette[:1], torch.nan)])
    return Call("quantize_colors", {"pixels": pixels, "palette": palette})


def fit_palette(d: Draw) -> Call:
    count = d.size(30, 1)
    pixels, _ = pixels_and_palette(d, count, colors=1)
    arguments = {"pixels": pixels, "colors": d.integer(d.size(min(count, 6), 1))}
    arguments |= {"seed": d.integer(d.size(9)), "iterations": d.integer(d.size(5))}
    return Call("fit_palette", arguments)


def loss_options(d: Draw, mask: Tensor | None) -> dict[str, Any]:
    return {
        "mask": mask,
        "reduction": d.one("mean", "sum", "none"),
        "label_smoothing": d.number(d.one(0.0, 0.25, 1.0)),
        "z_loss": d.number(d.one(0.0, 0.0, 2.0**-10, 1.0)),
        "return_z_loss": d.flag(),
    }


def targets(d: Draw, positions: list[int], colors: int, mask: Tensor | None) -> dict[str, Tensor]:
    """Pixels and palette, or tokens; where the mask leaves out, tokens outside the palette."""
    if d.flag():
        pixels, palette = pixels_and_palette(d, *positions, colors=colors)
        return {"pixels": pixels, "palette": palette}
    tokens = d.integers(0, min(colors, 127), *positions, dtype=d.one(*INTEGERS))
    if d.size(4) == 0:
        wrong = d.one(-1, colors, 127, -(2**40), 2**40)
        info = torch.iinfo(tokens.dtype)
        wrong = min(max(wrong, info.min), info.max)
        kept = torch.rand(tokens.shape, generator=d.generator()) < 0.7
        kept = kept if mask is None or d.flag() else mask.view(torch.uint8) != 0
        tokens = tokens.where(kept, torch.tensor(wrong, dtype=tokens.dtype))
    return {"pixels": tokens}


def color_cross_entropy(d: Draw) -> Call:
    dtype, exact = d.one(*FLOATS), d.flag()
    positions = [d.size(4) if d.size(9) == 0 else d.size(4, 1) for _ in range(d.size(2))]
    colors = d.one(1, 2, 3, 17, 100)
    mask = d.mask(*positions) if d.flag() else None
    logits = d.floats(*positions, colors, dtype=dtype, exact=exact)
    if dtype in (torch.float32, torch.float64):
        logits = logits + d.one(0.0, 0.0, 1e4, 1e6, -1e6)
    logits = logits * d.one(1.0, 1.0, 2.0**7, 2.0**-20)
    largest = float(logits.abs().max()) if logits.numel() else 0.0
    if mask is not None and d.flag():
        logits = d.poison(logits, mask.view(torch.uint8) != 0)
    arguments = {"logits": logits, **targets(d, positions, colors, mask)}
    arguments |= loss_options(d, mask) | {"inplace_backward": d.flag()}
    smoothed = float(arguments["label_smoothing"]) > 0 or float(arguments["z_loss"]) > 0
    return Call("color_cross_entropy", arguments, largest if smoothed or not exact else 0.0)


def linear_color_cross_entropy(d: Draw) -> Call:
    dtype, exact = d.one(*FLOATS), d.flag()
    positions = [d.size(4) if d.size(9) == 0 else d.size(4, 1) for _ in range(d.size(2))]
    colors, features = d.one(1, 2, 3, 17), d.one(1, 2, 5, 16)
    mask = d.mask(*positions) if d.flag() else None
    hidden = d.floats(*positions, features, dtype=dtype, exact=exact)
    weight = d.floats(colors, features, dtype=dtype, exact=exact)
    if mask is not None and d.flag():
        hidden = d.poison(hidden, mask.view(torch.uint8) != 0)
    arguments = {"hidden": hidden, "weight": weight, **targets(d, positions, colors, mask)}
    offset = d.one(0.0, 0.0, 1e4) if dtype in (torch.float32, torch.float64) else 0.0
    if d.flag():
        arguments["bias"] = d.floats(colors, dtype=dtype, exact=exact) + offset
    arguments |= loss_options(d, mask)
    count = max(1, int(np.prod(positions)))
    amplified = 4.0 * features + 4 + offset
    return Call("linear_color_cross_entropy", arguments, amplified, 8.0 * features * count)


def contrastive(d: Draw, function: str) -> Call:
    dtype = d.one(*FLOATS)
    count, features = d.size(7, 1), d.one(1, 2, 5, 16)
    names = {"supcon": ("z",), "info_nce": ("a", "b")}.get(function, ("z0", "z1"))
    unit = d.flag()
    size = 1.0 if dtype == torch.float16 or not unit else d.one(1.0, 1.0, 1e-6, 1e6)
    arguments: dict[str, Any] = {
        name: d.floats(count, features, dtype=dtype, exact=False) * size for name in names
    }
    if function == "supcon":
        arguments["labels"] = d.integers(-2, 3, count, dtype=d.one(*INTEGERS[1:]))
    scale = d.one(2.0, 2.0, 1.0, 0.01, 100.0, -3.0, 1e4)
    named = "logit_scale" if function == "info_nce" else "temperature"
    value = scale if function == "info_nce" else 1 / scale
    if function == "info_nce" and d.size(5) == 0:
        value = 0.0
    if d.flag():
        shape = d.one((), (1,))
        arguments[named] = torch.full(shape, value, dtype=d.one(torch.float32, torch.float64))
    else:
        arguments[named] = d.number(value)
    arguments |= {"normalize": unit, "reduction": d.one("mean", "sum", "none")}
    if function == "info_nce":
        arguments["bias"] = d.one(None, d.number(0.5), torch.tensor(-10.0))
    elif d.flag():
        arguments["negatives"] = d.floats(d.size(5), features, dtype=dtype, exact=False)
    amplified = abs(scale) * (1.0 if unit else 16.0 * features)
    return Call(function, arguments, amplified, max(1.0, amplified) * (1 if unit else 4) / size)


FUNCTIONS: dict[str, Callable[[Draw], Call]] = {
    "axial_attention": lambda d: axial_attention(d, packed=False),
    "axial_attention_packed": lambda d: axial_attention(d, packed=True),
    "quantize_colors": quantize_colors,
    "fit_palette": fit_palette,
    "color_cross_entropy": color_cross_entropy,
    "linear_color_cross_entropy": linear_color_cross_entropy,
    **{
        name: lambda d, name=name: contrastive(d, name)
        for name in ("nt_xent", "dcl", "supcon", "info_nce")
    },
}


@st.composite
def calls(draw: Any, function: str) -> Call:
    return FUNCTIONS[function](Draw(draw))
