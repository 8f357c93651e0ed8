"""The presets of `gcrl train`: what they change of config.py's defaults, which are `digits`."""

from __future__ import annotations

from gcrl.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RuntimeConfig,
    ViewsConfig,
)

DIGITS = Config(preset="digits")  # a CPU, minutes

# For photographs. Trials of benchmarks/results/search_cifar10_small.json found it: "2: beta 0.1",
# "3: temperature 0.2".
SEARCHED = ObjectiveConfig(alpha=1.0, beta=0.1, temperature=0.2)

# A CPU with two cores, about 20 minutes. Of the same search, which chose "5: learning_rate 0.008",
# no trial of other layers ("4: ...") did better while it kept the accuracy.
CIFAR10_SMALL = Config(
    preset="cifar10-small",
    data=DataConfig(data=""),
    model=ModelConfig(grid=(16, 16), colors=512, width=96, heads=6, outer_layers=4, inner_layers=2),
    views=ViewsConfig(
        weak_shift=2, flip=True, crop_scale=(0.2, 1.0), color_jitter=0.5, grayscale=0.2
    ),
    objective=SEARCHED,
    optim=OptimConfig(batch_size=128, steps=760, learning_rate=8e-3, warmup_steps=50, ema=0.98),
    evaluation=EvaluationConfig(probe_train=5000, probe_test=2000),
)

CIFAR10 = Config(  # one GPU
    preset="cifar10",
    data=DataConfig(data=""),
    model=ModelConfig(
        grid=(32, 32), colors=512, width=512, heads=8, outer_layers=8, inner_layers=4
    ),
    views=ViewsConfig(
        weak_shift=4, flip=True, crop_scale=(0.2, 1.0), color_jitter=0.5, grayscale=0.2
    ),
    objective=SEARCHED,
    optim=OptimConfig(
        batch_size=256, steps=40_000, learning_rate=5e-4, warmup_steps=2000, ema=0.9995
    ),
    evaluation=EvaluationConfig(probe_train=50_000, probe_test=10_000, sample_count=64),
    runtime=RuntimeConfig(compile=True, log_every=50, checkpoint_every=1000),
)

# People's own, of which there may be few, on a CPU: what `gcrl train --data` begins from.
PICTURES = Config(
    preset="pictures",
    data=DataConfig(data=""),
    model=ModelConfig(grid=(16, 16), colors=64, width=64, heads=4),
    views=CIFAR10_SMALL.views,
    objective=SEARCHED,
    optim=OptimConfig(batch_size=64, steps=400, learning_rate=4e-3, warmup_steps=40),
    evaluation=EvaluationConfig(neighbors=10),
)

PRESETS: dict[str, Config] = {c.preset: c for c in (DIGITS, PICTURES, CIFAR10_SMALL, CIFAR10)}


def preset(name: str) -> Config:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
