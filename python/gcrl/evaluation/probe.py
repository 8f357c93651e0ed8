"""The linear classifier of the frozen encoding, chosen on held-out training images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.pipeline import Pipeline
from tqdm import tqdm

from gcrl.evaluation.store import array_digest
from gcrl.evaluation.subject import Subject
from gcrl.probes import STRENGTHS, fit


class Choice(NamedTuple):
    """The layer and the strength C that do best on held-out training images."""

    layer: int
    strength: float
    accuracy: np.ndarray
    """On the held-out images, [layers, strengths]."""


def choose(subject: Subject) -> Choice:
    """Sweep the layers and STRENGTHS; of equals, the later layer and the earlier strength."""
    features, train, validation = subject.features, subject.train, subject.validation
    labels = subject.labels[0]

    def sweep() -> np.ndarray:
        layers = features.layers(train.images)  # [N, layers, width]
        held_out = features.layers(validation.images)  # [M, layers, width]
        accuracy = np.empty((layers.shape[1], len(STRENGTHS)))
        bar = tqdm(
            np.ndindex(accuracy.shape),
            "probes",
            accuracy.size,
            disable=not subject.progress,
            leave=False,
        )
        for layer, strength in bar:
            probe = fit(layers[:, layer], labels, STRENGTHS[strength])
            accuracy[layer, strength] = probe.score(held_out[:, layer], validation.labels)
        return accuracy

    ingredients = (
        features.fingerprint, array_digest(train.images), array_digest(labels),
        array_digest(validation.images), array_digest(validation.labels), repr(STRENGTHS).encode(),
    )  # fmt: skip
    accuracy = subject.store.get("sweep", ingredients, sweep)
    layer = len(accuracy) - 1 - int(np.argmax(accuracy.max(1)[::-1]))
    return Choice(layer, STRENGTHS[int(np.argmax(accuracy[layer]))], accuracy)


def train_probe(subject: Subject, choice: Choice) -> Pipeline:
    """The probe of the chosen layer and strength."""
    features = subject.features.layer(subject.train.images, choice.layer)
    return fit(features, subject.labels[0], choice.strength)


def logits(probe: Pipeline, features: np.ndarray) -> np.ndarray:
    """Features [N, D] -> the logits of the probe's classes, [N, classes]."""
    scores = probe.decision_function(features)
    # Of two classes it is the second one's logit alone.
    return scores if scores.ndim == 2 else np.stack((np.zeros_like(scores), scores), 1)
