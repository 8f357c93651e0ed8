"""What a linear classifier and the nearest neighbours can read from features."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torchmetrics.functional.classification import binary_calibration_error

STRENGTHS = (1.0, 10.0, 0.1, 0.01, 0.001, 0.0001)  # C of the probe; the first wins a tie
CALIBRATION_BINS = 15


class NotFiniteError(ValueError):
    """A network whose outputs are NaN or infinite; the message says which."""


class Probe(NamedTuple):
    """A linear probe's accuracy and expected calibration error, and the strength C it chose."""

    accuracy: float
    calibration_error: float
    strength: float


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    seed: int = 0,
) -> Probe:
    """Logistic regression on standardised features.

    train, test: [N, D] and [M, D]; labels: integers [N] and [M]. The strength C is the one that
    does best on a fifth of the training features, held out, or 1 where there are fewer than five;
    the test features have no say in it.
    Raises NotFiniteError for features that are not finite.
    """
    check_finite(train, test)
    strength = _choose_strength(train, train_labels, seed)
    probe = fit(train, train_labels, strength)
    probabilities = probe.predict_proba(test)  # [M, classes]
    correct = probe.classes_[probabilities.argmax(1)] == test_labels
    error = calibration_error(probabilities.max(1), correct)
    return Probe(float(correct.mean()), error, strength)


def nearest_neighbors(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    neighbors: int,
) -> float:
    """Accuracy of the majority among the nearest training features, by cosine once standardised.

    Shapes as in linear_probe. Raises NotFiniteError for features that are not finite, ValueError
    where there are fewer training features than neighbours.
    """
    check_finite(train, test)
    if not 1 <= neighbors <= len(train):
        raise ValueError(f"neighbors: expected 1 to {len(train)}, got {neighbors}")
    classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(neighbors, metric="cosine"))
    return float(classifier.fit(train, train_labels).score(test, test_labels))


def fit(features: np.ndarray, labels: np.ndarray, strength: float) -> Pipeline:
    """Logistic regression of strength C on standardised features [N, D]; labels: integers [N]."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-3, max_iter=200))
    with warnings.catch_warnings():
        # A weakly regularised fit that stops early is a sound probe; the held-out part judges it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(features, labels)


def _choose_strength(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    held = _held_out(labels, seed)
    if not held.any() or len(np.unique(labels[~held])) < 2:  # nothing to compare
        return STRENGTHS[0]
    scores = [
        fit(features[~held], labels[~held], strength).score(features[held], labels[held])
        for strength in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(scores))]


def _held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """A fifth of the samples, bool [N], with each class's share."""
    shuffle = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffle[np.argsort(labels[shuffle], kind="stable")]
    held = np.zeros(len(labels), dtype=bool)
    held[by_class[4::5]] = True
    return held


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error of the top class in 15 bins (Guo et al. 2017).

    confidence: floats in 0..1, [N]; correct: bool [N], whether the top class was the true one.
    """
    # The binary form takes any confidences beside right or wrong, so that a test class which the
    # probe has never seen counts as wrong. A confidence of 1 is the last bin's.
    below_one = np.nextafter(np.float32(1), np.float32(0))
    confidence = np.minimum(confidence, below_one, dtype=np.float32)
    error = binary_calibration_error(
        torch.from_numpy(confidence), torch.from_numpy(correct).long(), n_bins=CALIBRATION_BINS
    )
    return float(error)


def check_finite(*features: np.ndarray) -> None:
    """Raise NotFiniteError unless features [N, D] are."""
    for part in features:
        bad = int((~np.isfinite(part).all(axis=1)).sum())
        if bad:
            raise NotFiniteError(f"features: {bad} of {len(part)} images have NaN or infinite ones")
