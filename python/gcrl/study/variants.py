"""What is compared: four trainings of one network, and two networks beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gcrl.config import Config, ConfigError

UNTRAINED, LABELS = "untrained", "labels"


@dataclass(frozen=True)
class Variant:
    """One network of the study."""

    title: str
    generates: bool
    """Whether its decoder is trained, so that its likelihood means something."""
    encoded_views: int
    """Views of an image that go through the encoder in a step."""


VARIANTS = {
    "hybrid": Variant("hybrid (GCRL)", True, 2),
    "contrastive": Variant("contrastive, on the hybrid's pairs", False, 2),
    "simclr": Variant("contrastive, on two strong views (SimCLR)", False, 2),
    "generative": Variant("generative", True, 1),
    LABELS: Variant("trained with labels", False, 1),
    UNTRAINED: Variant("untrained", False, 0),
}
TRAINED = ("hybrid", "contrastive", "simclr", "generative")


def configure(config: Config, name: str, seed: int) -> Config:
    """The hybrid's configuration as one of TRAINED has it, with that seed."""
    config = replace(config, runtime=replace(config.runtime, seed=seed))
    objective, views = config.objective, config.views
    if name in ("contrastive", "simclr"):
        objective = replace(objective, alpha=0.0)
    if name == "simclr":
        views = replace(views, two_strong=True)
    if name == "generative":
        objective = replace(objective, beta=0.0)
    evaluation = replace(config.evaluation, evaluate=False)
    return replace(config, objective=objective, views=views, evaluation=evaluation)


def check_hybrid(config: Config) -> None:
    """Raise ConfigError unless the configuration trains with both losses."""
    for name in ("alpha", "beta"):
        if not getattr(config.objective, name) > 0:
            raise ConfigError(f"{name}: expected more than 0, as the hybrid has both losses")
    for name in TRAINED:
        configure(config, name, config.runtime.seed).validate()
