"""What a network makes of images, kept under the weights and images that it follows from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property

import numpy as np
from torch import Tensor

from gcrl.evaluation.store import Store, array_digest, digest
from gcrl.probes import check_finite
from gcrl.run import Run


class Features:
    """Reads a run's network. Images are uint8 [N, h, w, 3], averaged or resized to its grid.

    Raises NotFiniteError where the network's outputs are NaN or infinite.
    """

    def __init__(self, run: Run, store: Store, *, progress: bool = False) -> None:
        self.run, self.store, self.progress = run, store, progress

    def layers(self, images: np.ndarray) -> np.ndarray:
        """Every layer's mean over the pixels, float32 [N, layers, width]; see model.layer_names."""
        return self._read("layers", images, self.run.layers)

    def layer(self, images: np.ndarray, layer: int) -> np.ndarray:
        """One layer's mean over the pixels, float32 [N, width]."""
        return np.ascontiguousarray(self.layers(images)[:, layer])

    def encoding(self, images: np.ndarray) -> np.ndarray:
        """The representation, float32 [N, width]: a layer too, so that one pass serves both."""
        return self.layer(images, self.run.model.layer_names.index("encoding"))

    def log_prob(self, images: np.ndarray) -> np.ndarray:
        """log p(image) in nats, float64 [N]."""
        return self._read("log-prob", images, self.run.log_prob).astype(np.float64)

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of the network: its shape, its weights and its palette."""
        shape = json.dumps(asdict(self.run.config.model)).encode()
        weights = self.run.model.state_dict()
        arrays = [array_digest(weights[name].cpu().numpy()) for name in sorted(weights)]
        palette = array_digest(self.run.palette.cpu().numpy())
        return digest(shape, palette, *arrays).encode()

    def _read(self, kind: str, images: np.ndarray, function: Callable[..., Tensor]) -> np.ndarray:
        def compute() -> np.ndarray:
            output = function(images, progress=self.progress).numpy()
            check_finite(output.reshape(len(output), -1))
            return output

        return self.store.get(kind, (self.fingerprint, array_digest(images)), compute)
