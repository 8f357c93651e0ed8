"""Trains and measures the networks of a study, one after another."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gcrl
from gcrl.config import SEEDS, Config, ConfigError, parse_json
from gcrl.data import Dataset, ImageSet, load_dataset
from gcrl.distributed import find_device
from gcrl.evaluation import finetuning, suite
from gcrl.evaluation.options import Options, ood_name
from gcrl.evaluation.store import Store, array_digest, content_digest, digest
from gcrl.evaluation.subject import Subject
from gcrl.evaluation.suite import StoppedError, run_parts
from gcrl.interrupts import Interrupted
from gcrl.lock import hold
from gcrl.paths import expand
from gcrl.probes import check_finite
from gcrl.run import Run, load
from gcrl.study import report
from gcrl.study.compute import training_flops, training_seconds
from gcrl.study.variants import LABELS, TRAINED, UNTRAINED, VARIANTS, check_hybrid, configure
from gcrl.study.verdict import judge
from gcrl.trainer import resolve_precision, train

PARTS = ("classification", "likelihood", "ood")


@dataclass(frozen=True)
class Study:
    """Where a study lies, and what it compares."""

    config: Config
    folder: Path
    seeds: tuple[int, ...]
    options: Options
    progress: bool = True

    def conduct(self) -> dict[str, Any]:
        """Train and measure everything that is not done yet; returns what study.json holds.

        study.json, study.md and study.png are written after every network. Stopped, it goes on
        from the last checkpoint of the run it was in (the network that is trained with labels
        begins anew). Seeds that are whole in study.json stay in it, and their folders need not be
        there any more.
        Raises ConfigError for settings that make no study, or not the one that lies there;
        StoppedError after Ctrl-C.
        """
        self._check()
        with hold(self.folder):
            return self._conduct()

    def _conduct(self) -> dict[str, Any]:
        grid, data = self.config.model.grid, self.config.data
        dataset = load_dataset(data.data, grid, download=data.download)
        identity = self._identity(dataset)
        finished = self._finished(dataset, identity)
        measured: dict[int, dict[str, Any]]
        measured = {s: finished.get(s, {}) for s in sorted({*finished, *self.seeds})}
        results = self._results(measured, dataset, identity)
        for seed in self.seeds:
            for name in VARIANTS if seed not in finished else ():
                self._say(f"seed {seed}: {VARIANTS[name].title}")
                try:
                    found = self._measure(name, seed, dataset)
                except (KeyboardInterrupt, Interrupted, StoppedError) as error:
                    raise StoppedError(
                        f"interrupted in {name}, seed {seed}; what is done is kept in "
                        f"{self.folder}, and the same command goes on from there"
                    ) from error
                if found is not None:
                    measured[seed][name] = found
                results = self._results(measured, dataset, identity)
                report.write(self.folder, results)
        return results

    def _finished(self, dataset: Dataset, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """The seeds that are whole in the study.json that lies there, if it is of this study.

        Of another one, they can be measured anew where their runs are; ConfigError where not.
        """
        path = self.folder / "study.json"
        if not path.exists():
            return {}
        try:
            saved = parse_json(path.read_bytes())
            seeds = {entry["seed"]: dict(entry["networks"]) for entry in saved["seeds"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: is damaged, or no study's: remove it, and what the runs beside it hold "
                f"is measured anew ({error!r})"
            ) from error
        expected = set(VARIANTS) - ({LABELS} if dataset.train.labels is None else set())
        whole = {seed: found for seed, found in seeds.items() if set(found) == expected}
        differing = [key for key, value in identity.items() if saved.get(key) != value]
        if not differing:
            return whole
        lost = [str(seed) for seed in whole if not (self.folder / f"seed-{seed}").is_dir()]
        if lost:
            raise ConfigError(
                f"{self.folder} holds another study (in {', '.join(differing)}), which cannot be "
                f"measured anew without the runs of seed {', '.join(lost)}: choose another folder"
            )
        return {}

    def _identity(self, dataset: Dataset) -> dict[str, Any]:
        """What all numbers of a study follow from, but for the seeds."""
        config = json.loads(self.config.to_json())
        del config["data"], config["runtime"]
        options = self.options
        measured = {
            "train_images": options.train_images, "test_images": options.test_images,
            "labels_per_class": list(options.labels_per_class), "draws": options.draws,
            "ood": {ood_name(source): content_digest(source) for source in options.ood},
        }  # fmt: skip
        sets = (dataset.train, dataset.test)
        arrays = [array_digest(array) for part in sets for array in (part.images, part.labels)]
        palette = self.config.data.palette
        return {
            "config": config,
            "format": suite.FORMAT,
            "precision": resolve_precision(find_device(self._device), self.config.runtime),
            "palette": palette and digest(expand(palette).read_bytes()),
            "options": measured,
            "images": digest(*arrays),
        }

    def _check(self) -> None:
        check_hybrid(self.config)
        self.options.validate()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("a study runs in one process: call `gcrl study` without torchrun")
        for seed in self.seeds:
            if seed not in SEEDS:
                raise ConfigError(f"seeds: expected at least 0 and below 2^63, got {seed}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: expected different ones, got {list(self.seeds)}")

    def _measure(self, name: str, seed: int, dataset: Dataset) -> dict[str, Any] | None:
        """One network's measures; None for the one with labels where there are none."""
        if name == LABELS and dataset.train.labels is None:
            return None
        folder = self.folder / f"seed-{seed}" / name
        if name in TRAINED:
            run = self._train(name, seed, folder)
        else:
            hybrid = load(self.folder / f"seed-{seed}" / "hybrid", device=self._device)
            run = hybrid.untrained()
        classifier = None
        if name == LABELS:
            classifier = self._train_with_labels(run, dataset.train, folder)
            run = classifier.run
        subject = Subject(run, dataset, folder / "evaluation", self.options, self.progress)
        measures = summarise(run_parts(subject, PARTS), VARIANTS[name].generates)
        if classifier is not None and subject.test.labels is not None:
            encoding = subject.features.encoding(subject.test.images)
            check_finite(encoding)
            predicted = classifier.classes[classifier.logits(encoding).argmax(1)]
            measures["head_accuracy"] = float((predicted == subject.test.labels).mean())
        return measures | self._compute(name, folder)

    def _train(self, name: str, seed: int, folder: Path) -> Run:
        config = configure(self.config, name, seed)
        train(config, folder, resume=(folder / "config.json").exists(), progress=self.progress)
        return load(folder, device=self._device)

    def _train_with_labels(
        self, untrained: Run, images: ImageSet, folder: Path
    ) -> finetuning.Classifier:
        """From the same start, as many images in the same order as the other runs."""
        optim = self.config.optim
        optim = replace(optim, batch_size=optim.batch_size * optim.accumulate, accumulate=1)
        optim = finetuning.averaged(optim)
        subject = Subject(untrained, Dataset("", images, images, None), folder, self.options)
        store = Store(folder / "evaluation" / "features")
        ingredients = (
            subject.features.fingerprint, array_digest(images.images), array_digest(images.labels),
            repr((optim, self.config.views, subject.seed)).encode(),
        )  # fmt: skip
        return finetuning.kept_classifier(
            store, store.path("labels", ingredients, ".safetensors"), untrained, images, optim,
            alpha=0.0, name="with labels", progress=self.progress,
        )  # fmt: skip

    def _compute(self, name: str, folder: Path) -> dict[str, Any]:
        optim, variant = self.config.optim, VARIANTS[name]
        images = optim.steps * optim.batch_size * optim.accumulate if name != UNTRAINED else 0
        flops = training_flops(
            self.config.model, variant.encoded_views, generates=variant.generates
        )
        seconds = training_seconds(folder) if name in TRAINED else None
        return {"images_seen": images, "training_flops": images * flops, "seconds": seconds}

    def _results(
        self, measured: dict[int, dict[str, Any]], dataset: Dataset, identity: dict[str, Any]
    ) -> dict[str, Any]:
        complete = [found for found in measured.values() if set(TRAINED) <= set(found)]
        found = [network for networks in measured.values() for network in networks.values()]
        sizes = {name: size for network in found for name, size in network["ood_images"].items()}
        sets = sorted(sizes)
        return {
            "dataset": dataset.name,
            **identity,
            "versions": {"gcrl": gcrl.__version__, "torch": torch.__version__},
            "device": str(self._device),
            "sets": sets,
            "set_sizes": sizes,
            "seeds": [
                {"seed": seed, "networks": found} for seed, found in measured.items() if found
            ],
            "verdicts": judge(complete, sets),
        }

    @property
    def _device(self) -> str:
        return self.config.runtime.device

    def _say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)


def summarise(parts: dict[str, Any], generates: bool) -> dict[str, Any]:
    """Of a network's evaluation, the numbers that are compared.

    The likelihood of a decoder that was not trained, and the scores made of it, are left out.
    """
    classification, density, ood = (parts[name] for name in PARTS)
    found = {"test_images": density["test_images"], "auroc": {}, "ood_images": {}}
    if "not_measured" not in classification:
        found["accuracy"] = classification["linear_probe"]
        found["layer"] = classification["layer"]
        found["knn"] = classification.get("knn", {}).get("accuracy")
    if generates:
        found["bits_per_pixel"] = density["bits_per_pixel"]
    for name, part in ood.get("sets", {}).items():
        found["ood_images"][name] = part["images"]
        found["auroc"][name] = {
            score: values["auroc"]
            for score, values in part["scores"].items()
            if generates or not score.startswith(("likelihood", "typicality"))
        }
    return found
