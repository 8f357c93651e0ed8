"""Configurations: JSON there and back, errors that name the field, presets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gcrl.config import Config, ConfigError
from gcrl.presets import PRESETS, preset


def changed(**flat: Any) -> Config:
    """The default configuration with some fields changed, by the names of their flags."""
    values = Config().to_dict()
    for name, value in flat.items():
        group = next((g for g in values.values() if isinstance(g, dict) and name in g), values)
        group[name] = value
    return Config.from_dict(values)


@pytest.mark.parametrize("name", PRESETS)
def test_json_there_and_back(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert Config.from_json(config.to_json()) == config


def test_flag_names_are_unique() -> None:
    groups = [value for value in Config().to_dict().values() if isinstance(value, dict)]
    assert len(Config().flat()) == 1 + sum(map(len, groups))


def test_integers_serve_as_floats_but_not_otherwise() -> None:
    config = changed(clip=2)
    assert config.optim.clip == 2.0
    assert isinstance(config.optim.clip, float)
    with pytest.raises(ConfigError, match="steps: expected a value of type int, got 2.0"):
        changed(steps=2.0)


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("optim", "lr", 1.0, r"f\.json: optim: unknown field 'lr'; expected .*learning_rate"),
        ("model", "width", ..., r"f\.json: model: the field 'width' is missing"),
        (None, "views", ..., r"f\.json: the field 'views' is missing"),
        (None, "model", 3, "model: expected an object with fields, got 3"),
        ("optim", "steps", "9", "optim: steps: expected a value of type int, got '9'"),
        ("optim", "steps", True, "steps: expected a value of type int, got True"),
        ("runtime", "compile", 1, "compile: expected true or false, got 1"),
        ("runtime", "precision", "half", "precision: expected one of 'auto'.*, got 'half'"),
        ("runtime", "precision", ["auto"], "precision: expected one of 'auto'.*, got .'auto'."),
        ("model", "grid", [4, 4, 4], r"grid: expected 2 values of type int, got \[4"),
        ("model", "grid", [4, 4.5], r"grid\[1\]: expected a value of type int, got 4.5"),
        ("data", "palette", 3, "palette: expected a text, got 3"),
    ],
)
def test_json_that_does_not_fit(group: str | None, field: str, value: Any, message: str) -> None:
    values = Config().to_dict()
    fields = values if group is None else values[group]
    fields[field] = value
    if value is ...:
        del fields[field]
    with pytest.raises(ConfigError, match=message):
        Config.from_json(json.dumps(values), "f.json")


def test_files_that_are_no_configuration(tmp_path: Any) -> None:
    for content in (None, b"{", b"\xff\xfe", b"[1]"):
        path = tmp_path / "config.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match="config.json"):
            Config.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("grid", (1, 16)), ("colors", 1), ("width", 0), ("heads", 5), ("heads", 0),
        ("outer_layers", 3), ("outer_layers", 0), ("inner_layers", 0), ("mlp_ratio", 0),
        ("projection_dim", 0), ("alpha", -1.0), ("alpha", float("nan")), ("beta", float("inf")),
        ("temperature", 0.0), ("batch_size", 1), ("accumulate", 0), ("steps", 0),
        ("learning_rate", 0.0), ("warmup_steps", -1), ("weight_decay", -0.1), ("clip", 0.0),
        ("ema", 1.0), ("probe_train", 0), ("probe_test", 0), ("neighbors", 0), ("sample_count", 0),
        ("seed", -1), ("device", "tpu"), ("backend", "gpu"), ("log_every", 0),
        ("checkpoint_every", 0), ("palette", ""), ("max_gigabytes", 0.0),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        changed(**{field: value}).validate()
    assert str(raised.value).startswith(f"{field}: expected ")
    assert f"got {value!r}" in str(raised.value)


def test_wrong_types_from_python_are_found() -> None:
    config = Config(optim=replace(Config().optim, steps="many"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps: expected a value of type int, got 'many'"):
        config.validate()


def test_both_weights_zero() -> None:
    with pytest.raises(ConfigError, match="beta: expected more than 0, as alpha is 0"):
        changed(alpha=0, beta=0).validate()
    changed(beta=0, batch_size=1).validate()  # nothing is contrasted


def test_views_are_checked_against_the_grid() -> None:
    with pytest.raises(ConfigError, match="weak_shift"):
        changed(weak_shift=16).validate()


def test_two_views_are_needed_only_to_contrast_them() -> None:
    plain: dict[str, Any] = {
        "weak_shift": 0, "crop_scale": [1.0, 1.0], "color_jitter": 0.0, "grayscale": 0.0
    }  # fmt: skip
    with pytest.raises(ConfigError, match="two views that are always the same"):
        changed(**plain).validate()
    changed(**plain, beta=0).validate()


def test_digits_are_not_mirrored() -> None:
    with pytest.raises(ConfigError, match="flip: expected false, as a mirrored digit is no digit"):
        changed(flip=True).validate()
    changed(flip=True, data="photos").validate()


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_trains_with_either_loss_alone(name: str) -> None:
    given = replace(preset(name), data=replace(preset(name).data, data="photos"))
    for weight in ("alpha", "beta"):
        replace(given, objective=replace(given.objective, **{weight: 0.0})).validate()


def test_presets_that_need_images_say_so() -> None:
    assert PRESETS["digits"].validate() is PRESETS["digits"]
    for name in ("cifar10-small", "cifar10"):
        with pytest.raises(ConfigError, match=f"'{name}' needs images: pass --data"):
            preset(name).validate()
        given = replace(preset(name), data=replace(preset(name).data, data="cifar"))
        assert given.validate() is given
    with pytest.raises(ConfigError, match="expected one of digits, .*got 'imagenet'"):
        preset("imagenet")
