"""The configuration of a run: its fields are the flags of `gcrl train`, and make config.json."""

from __future__ import annotations

import json
import re
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

INFINITY = float("inf")
SEEDS = range(2**63)
PresetName = Literal["digits", "pictures", "cifar10-small", "cifar10"]


class ConfigError(ValueError):
    """A configuration that cannot be read or makes no sense; the message names the field."""


def parse_json(text: str | bytes) -> Any:
    """The JSON value of a text; ValueError whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    data: str = "digits"
    """'digits', a CIFAR-10 folder (cifar-10-batches-py), an .npz file or a folder of images."""
    download: bool = False
    """Fetch CIFAR-10 into the folder that --data names, if it is not there yet."""
    palette: str | None = None
    """A palette to load (.npy, [colors, 3]); by default one is fitted on the training images."""
    max_gigabytes: float = 4.0
    """Memory that reading the images may take, about; a file that needs more is an error."""


@dataclass(frozen=True)
class ModelConfig:
    """The axial transformer."""

    grid: tuple[int, int] = (16, 16)
    """Height and width in pixels; images are averaged or resized to it."""
    colors: int = 16
    """Colours of the palette, which are the classes that a pixel is predicted among."""
    width: int = 96
    """Features per pixel."""
    heads: int = 6
    """Attention heads; they divide the width."""
    outer_layers: int = 2
    """Encoder blocks, alternately along rows and down columns; an even number."""
    inner_layers: int = 1
    """Decoder blocks, along rows."""
    mlp_ratio: int = 4
    """Hidden features of a block's MLP, in multiples of the width."""
    projection_dim: int = 128
    """Features of the projection z that the contrastive loss compares."""


@dataclass(frozen=True)
class ViewsConfig:
    """The two views of an image: a weak one, that is predicted too, and a strong one."""

    weak_shift: int = 3
    """Largest shift of the weak view in whole pixels (reflect-pad and crop)."""
    flip: bool = False
    """Mirror half of the images, in both views."""
    crop_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the area that the strong view's random resized crop keeps, from and to."""
    color_jitter: float = 0.5
    """Strength s of the strong view's jitter: brightness, contrast, saturation 0.8s, hue 0.2s."""
    grayscale: float = 0.8
    """Probability that the strong view is grey."""
    blur: float = 0.0
    """Probability that the strong view is blurred."""
    two_strong: bool = False
    """Make both views strong ones, as SimCLR does; only with --alpha 0."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = alpha * nats per pixel + beta * NT-Xent."""

    alpha: float = 1.0
    """Weight of the generative loss, the weak view's nats per pixel. 0 leaves the decoder out."""
    beta: float = 1.0
    """Weight of the contrastive loss over both views. 0 trains without the strong view."""
    temperature: float = 0.2
    """Temperature of NT-Xent."""
    score_first_pixel: bool = True
    """Count the first pixel's log-probability in training too; the paper's loss leaves it out."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, cosine decay, clipping and an average of the weights."""

    batch_size: int = 64
    """Images in a batch, on each process; with accumulation, in each part of a step."""
    accumulate: int = 1
    """Batches whose gradients make one step. NT-Xent compares within each batch."""
    steps: int = 600
    """Optimiser steps of the run."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW's weight decay, on matrices alone."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.98
    """Decay per step of the average of the weights, which evaluation uses; 0 keeps none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured when training ends."""

    evaluate: bool = True
    """Evaluate the run at its end."""
    probe_train: int = 5000
    """Labelled training images for the linear probe and k-NN, at most."""
    probe_test: int = 2000
    """Test images for the linear probe, k-NN and the likelihood, at most."""
    neighbors: int = 20
    """Neighbours of the k-NN classifier."""
    sample_count: int = 16
    """Images drawn for samples.png."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How it is run."""

    seed: int = 0
    """Seed of the weights, the order of the images, the views and the samples."""
    device: str = "auto"
    """'auto' takes a GPU where there is one; or 'cpu', 'cuda', 'cuda:1', 'mps'."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """'auto' trains in bfloat16 autocast on a GPU or CPU with products of it, else in float32."""
    backend: str | None = None
    """Backend of the kernels: 'reference', 'cpu', 'triton', 'cuda'; by default each one's best."""
    compile: bool = False
    """torch.compile the model."""
    timeout: float = 10.0
    """Minutes that the processes of a run wait for one another before they give up."""
    log_every: int = 10
    """Steps between two records in metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    preset: PresetName = "digits"
    """Preset that the settings start from; with --data by default 'pictures'."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested by group, as config.json is."""
        return asdict(self)

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Any, source: str = "configuration") -> Config:
        """The inverse of to_dict.

        Raises:
            ConfigError: a field is unknown, missing or of the wrong type.
        """
        config: Config = _read(values, cls, source)
        return config

    @classmethod
    def from_json(cls, text: str, source: str = "configuration") -> Config:
        """The inverse of to_json; `source` names the text in errors, which are as from_dict's."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ConfigError(
                f"{source}: expected JSON, got a text with an error: {error}"
            ) from error
        return cls.from_dict(values, source)

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a config.json; errors name the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from error
        return cls.from_json(text, str(path))

    def flat(self) -> dict[str, Any]:
        """Every field by the name of its flag; the names are unique over the groups."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            flat.update(value if isinstance(value, dict) else {name: value})
        return flat

    def validate(self) -> Config:
        """Return the configuration itself if it makes sense.

        Raises:
            ConfigError: naming the first field that does not, what was expected, and what came.
        """
        from gcrl import views
        from gcrl_kernels.backends import BACKENDS

        Config.from_dict(self.to_dict())
        if not self.data.data:
            raise ConfigError(
                f"data: the preset '{self.preset}' needs images: pass --data FOLDER, the folder "
                "'cifar-10-batches-py' (add --download to fetch CIFAR-10 into it)"
            )
        flat = self.flat()
        for name, holds, expected in _rules(self, BACKENDS):
            if not holds:
                raise ConfigError(f"{name}: expected {expected}, got {flat[name]!r}")
        try:
            views.validate(self.views, self.model.grid)
            if self.objective.beta > 0:
                views.check_pair(self.views)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return self


def _rules(config: Config, backends: tuple[str, ...]) -> list[tuple[str, bool, str]]:
    """(field, whether its value makes sense, what was expected)."""
    data, model, objective = config.data, config.model, config.objective
    optim, evaluation, runtime = config.optim, config.evaluation, config.runtime
    contrasts = objective.beta > 0
    return [
        ("palette", data.palette != "", "a path to an .npy file"),
        ("max_gigabytes", 0 < data.max_gigabytes < INFINITY, "a number above 0"),
        ("grid", min(model.grid) >= 2, "a height and a width of at least 2"),
        ("colors", model.colors >= 2, "at least 2"),
        ("width", model.width >= 1, "at least 1"),
        ("heads", model.heads >= 1 and model.width % model.heads == 0,
         f"a divisor of the width, {model.width}"),
        ("outer_layers", model.outer_layers >= 2 and model.outer_layers % 2 == 0,
         "an even number, at least 2"),
        ("inner_layers", model.inner_layers >= 1, "at least 1"),
        ("mlp_ratio", model.mlp_ratio >= 1, "at least 1"),
        ("projection_dim", model.projection_dim >= 1, "at least 1"),
        ("flip", not (config.views.flip and data.data == "digits"),
         "false, as a mirrored digit is no digit"),
        ("two_strong", not (config.views.two_strong and objective.alpha > 0),
         "false with alpha above 0, as a strong view's pixels are resampled"),
        ("alpha", 0 <= objective.alpha < INFINITY, "a number of at least 0"),
        ("beta", 0 <= objective.beta < INFINITY, "a number of at least 0"),
        ("beta", objective.alpha + objective.beta > 0, "more than 0, as alpha is 0"),
        ("temperature", 0 < objective.temperature < INFINITY, "a number above 0"),
        ("batch_size", optim.batch_size >= 1 + contrasts,
         "at least 2, for NT-Xent to compare" if contrasts else "at least 1"),
        ("accumulate", optim.accumulate >= 1, "at least 1"),
        ("steps", optim.steps >= 1, "at least 1"),
        ("learning_rate", 0 < optim.learning_rate < INFINITY, "a number above 0"),
        ("warmup_steps", optim.warmup_steps >= 0, "at least 0"),
        ("weight_decay", 0 <= optim.weight_decay < INFINITY, "a number of at least 0"),
        ("clip", 0 < optim.clip < INFINITY, "a number above 0"),
        ("ema", 0 <= optim.ema < 1, "at least 0 and below 1"),
        ("probe_train", evaluation.probe_train >= 1, "at least 1"),
        ("probe_test", evaluation.probe_test >= 1, "at least 1"),
        ("neighbors", evaluation.neighbors >= 1, "at least 1"),
        ("sample_count", evaluation.sample_count >= 1, "at least 1"),
        ("seed", runtime.seed in SEEDS, "at least 0 and below 2^63"),
        ("device", re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", runtime.device) is not None,
         "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        ("backend", runtime.backend is None or runtime.backend in backends,
         "one of " + ", ".join(map(repr, backends))),
        ("timeout", 0 < runtime.timeout <= 1e5, "a number of minutes above 0, at most 100,000"),
        ("log_every", runtime.log_every >= 1, "at least 1"),
        ("checkpoint_every", runtime.checkpoint_every >= 1, "at least 1"),
    ]  # fmt: skip


def _read(value: Any, kind: Any, where: str) -> Any:
    """The JSON value as the annotated type `kind`; `where` names it in errors."""
    if is_dataclass(kind):
        return _read_fields(value, kind, where)
    options = get_args(kind)
    if get_origin(kind) is Literal and value in options:
        return value
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        return None if value is None else _read(value, options[0], where)
    if get_origin(kind) is tuple and isinstance(value, list | tuple) and len(value) == len(options):
        parts = zip(value, options, strict=True)
        return tuple(_read(part, option, f"{where}[{i}]") for i, (part, option) in enumerate(parts))
    if type(value) is int and abs(value) >= 2**63:
        raise ConfigError(f"{where}: expected a number of 64 bits, got one of more")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{where}: expected {_describe(kind)}, got {value!r}")


def _read_fields(values: Any, kind: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object with fields, got {values!r}")
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in hints:
            raise ConfigError(f"{where}: unknown field {name!r}; expected {', '.join(names)}")
    for name in names:
        if name not in values:
            raise ConfigError(f"{where}: the field {name!r} is missing")
    return kind(**{name: _read(values[name], hints[name], f"{where}: {name}") for name in names})


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} values of type {get_args(kind)[0].__name__}"
    return {"str": "a text", "bool": "true or false"}.get(
        kind.__name__, f"a value of type {kind.__name__}"
    )
