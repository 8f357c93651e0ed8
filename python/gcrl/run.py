"""A trained run: its network as an encoder, a density and a sampler of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gcrl import checkpoint, sampling
from gcrl.config import Config
from gcrl.data import fit_to_grid
from gcrl.manifest import check
from gcrl.model import GCRL
from gcrl.palette import load_palette, to_rgb, to_tokens


def resolve_device(name: str) -> torch.device:
    """The device that `name` means here: 'auto' is CUDA where there is a GPU for it, else the CPU.

    Raises ValueError for a name that torch does not know and for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got {name!r}"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device: {name!r} was asked for, but PyTorch sees {count} CUDA GPUs")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"device: {name!r} was asked for, but PyTorch sees no Apple GPU")
    elif device.type != "cpu":
        raise ValueError(f"device: expected a CPU, CUDA or MPS device, got {name!r}")
    return device


def build_model(config: Config) -> GCRL:
    """The run's network before training, on the CPU: its weights follow from the seed alone.

    Leaves every random generator as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.runtime.seed)
        return GCRL(config.model, backend=config.runtime.backend)


@dataclass(frozen=True)
class Run:
    """A network with its palette.

    Images go in as uint8 [N, height, width, 3], arrays or tensors of any size; they are averaged
    or resized to the run's grid. What comes out is on the CPU.
    """

    config: Config
    model: GCRL
    palette: Tensor  # [K, 3] float32, 0..255
    folder: Path | None = None
    step: int = 0

    @property
    def device(self) -> torch.device:
        return self.palette.device

    @property
    def kept_rows(self) -> int:
        """The upper rows that `complete` keeps: half of them, and the middle one."""
        return (self.config.model.grid[0] + 1) // 2

    def encode(self, images: np.ndarray | Tensor, *, progress: bool = False) -> Tensor:
        """The representation of each image, float32 [N, width]: the encoding's mean over pixels."""
        return self._map(self.model.features, images, "encode" if progress else None)

    def layers(self, images: np.ndarray | Tensor, *, progress: bool = False) -> Tensor:
        """Every layer's mean over the pixels, float32 [N, layers, width]; see model.layer_names."""
        return self._map(self.model.layers, images, "layers" if progress else None)

    def log_prob(self, images: np.ndarray | Tensor, *, progress: bool = False) -> Tensor:
        """log p(image) in nats, float32 [N]: of the image on the run's grid, in palette colours."""
        return self._map(self.model.log_prob, images, "log-probability" if progress else None)

    def sample(
        self, n: int, seed: int | None = None, *, temperature: float = 1.0, progress: bool = False
    ) -> Tensor:
        """n images drawn from the model, uint8 [n, H, W, 3]; the same ones for the same seed."""
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n: expected a positive integer, got {n!r}")
        generator = self._generator(seed)
        tokens = [
            sampling.sample(
                self.model,
                min(self._batch, n - start),
                temperature=temperature,
                generator=generator,
                progress=progress,
            )
            for start in range(0, n, self._batch)
        ]
        return to_rgb(torch.cat(tokens), self.palette).cpu()

    def complete(
        self,
        images: np.ndarray | Tensor,
        seed: int | None = None,
        *,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        """The images on the run's grid with their lower half drawn anew, uint8 [N, H, W, 3].

        The upper half (of an odd height, the middle row too) is kept, in palette colours.
        """
        generator = self._generator(seed)

        def draw(tokens: Tensor) -> Tensor:
            return sampling.complete(
                self.model,
                tokens,
                self.kept_rows,
                temperature=temperature,
                generator=generator,
                progress=progress,
            )

        return to_rgb(self._map(draw, images).to(self.device), self.palette).cpu()

    def quantize(self, images: np.ndarray | Tensor) -> Tensor:
        """The images as the model sees them, uint8 [N, H, W, 3]: its grid, its palette."""
        return to_rgb(self._map(lambda tokens: tokens, images).to(self.device), self.palette).cpu()

    def fit(self, images: np.ndarray | Tensor) -> Tensor:
        """The images averaged or resized to the run's grid, uint8 [N, H, W, 3]."""
        fitted = fit_to_grid(_checked(images), self.config.model.grid)
        return torch.from_numpy(np.array(fitted, order="C"))  # a copy: they may be read-only

    def untrained(self) -> Run:
        """The same run before its first step."""
        return replace(self, model=build_model(self.config).to(self.device).eval(), step=0)

    @property
    def _batch(self) -> int:
        return self.config.optim.batch_size

    @staticmethod
    def _generator(seed: int | None) -> torch.Generator | None:
        # On the CPU everywhere, so that a seed means the same noise on every device.
        return None if seed is None else torch.Generator().manual_seed(seed)

    def _batches(self, images: np.ndarray | Tensor, label: str | None) -> Iterator[Tensor]:
        pixels = _checked(images)
        starts = range(0, len(pixels), self._batch)
        for start in tqdm(starts, desc=label, disable=label is None, leave=False):
            part = self.fit(pixels[start : start + self._batch])
            yield to_tokens(part.to(self.device), self.palette)  # [b, H, W]

    def _map(
        self,
        function: Callable[[Tensor], Tensor],
        images: np.ndarray | Tensor,
        label: str | None = None,
    ) -> Tensor:
        with torch.no_grad():
            return torch.cat([function(tokens).cpu() for tokens in self._batches(images, label)])


def _checked(images: np.ndarray | Tensor) -> np.ndarray:
    if not isinstance(images, np.ndarray | Tensor):
        raise TypeError(f"images: expected an array or a tensor, got {type(images).__name__}")
    if images.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"images: expected uint8, 0 to 255, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images: expected [N, height, width, 3], got {list(images.shape)}")
    return images.cpu().numpy() if isinstance(images, Tensor) else images


def load(folder: str | Path, *, device: str = "auto", ema: bool = True) -> Run:
    """Load a run from the folder that training left.

    folder: runs/<name>, with config.json, palette.npy and checkpoints.
    device: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.
    ema: take the average of the weights, where the run keeps one.
    Raises FileNotFoundError where the folder is not a run or has no checkpoint yet, ValueError for
    files that do not fit together, and CheckpointError for a checkpoint that is damaged, or not of
    the configuration and palette that lie beside it.
    """
    folder = Path(folder)
    place = resolve_device(device)
    for name in ("config.json", "palette.npy"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {name}")
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    config = Config.load(folder / "config.json")
    palette = load_palette(folder / "palette.npy", rescale=False)
    if len(palette) != config.model.colors:
        raise ValueError(
            f"{folder}: palette.npy has {len(palette)} colours, "
            f"the model in config.json {config.model.colors}"
        )
    state = checkpoint.load_state(saved)
    check(saved, state, config, palette)
    model = build_model(config)
    checkpoint.load_weights(model, saved, ema=ema)
    return Run(config, model.to(place).eval(), palette.to(place), folder, state["step"])
