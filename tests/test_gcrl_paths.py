"""Paths on the command line: home folders, '.', '..' and '/'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from PIL import Image

from gcrl import cli, paths
from gcrl.config import Config, ConfigError
from gcrl.data import DataError, load_dataset
from gcrl.evaluation.options import Options, ood_name, stamp


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with pictures in ~/photos, and another folder to work in."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "photos", elsewhere):
        folder.mkdir(parents=True)
    for index in range(6):
        Image.new("RGB", (4, 4), (40 * index, 0, 0)).save(home / "photos" / f"{index}.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    return home


def test_every_path_of_a_command_is_expanded(home: Path) -> None:
    data = replace(Config().data, data="~/photos", palette="~/palette.npy")
    settings = replace(Config(), data=data)
    train = paths.expand_all(cli.Train(settings, out=Path("~/run"), config=Path("~/c.json")))
    assert train.settings.data.data == f"{home}/photos"
    assert train.settings.data.palette == f"{home}/palette.npy"
    assert (train.out, train.config) == (home / "run", home / "c.json")
    options = Options(ood=("~/a.npz", "b~"), inception=Path("~/w"), cifar10_c=Path("~/c"))
    evaluate = paths.expand_all(cli.Evaluate(Path("~/run"), data="~/photos", measurement=options))
    assert (evaluate.run, evaluate.data) == (home / "run", f"{home}/photos")
    assert evaluate.measurement.ood == (f"{home}/a.npz", "b~")
    assert evaluate.measurement.inception == home / "w"
    assert evaluate.measurement.cifar10_c == home / "c"
    sample = paths.expand_all(cli.Sample(Path("~"), complete="~/photos", out=Path("~/x.png")))
    assert (sample.run, sample.complete, sample.out) == (home, f"{home}/photos", home / "x.png")


def test_what_is_no_home_folder_stays() -> None:
    train = cli.Train(Config(), out=Path("a~b/~c"))
    assert paths.expand_all(train) == train
    assert train.settings.data.data == "digits"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out=~/run"],
        ["train", "--out", "~/run"],
        ["train", "--out=~/run", "--data=~/photos", "--palette=~/p.npy"],
    ],
)
def test_training_in_a_home_folder(
    home: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("gcrl.trainer.train", lambda *given, **_: calls.append(given))
    assert cli.main(words) == 0
    ((settings, out),) = calls
    assert out == home / "run"
    assert "~" not in f"{settings.data.data}{settings.data.palette}"
    assert not list(Path().iterdir())


def test_a_configuration_in_a_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(tiny_run.CONFIG.to_json())
    calls: list[Any] = []
    monkeypatch.setattr("gcrl.trainer.train", lambda *given, **_: calls.append(given))
    assert cli.main(["train", "--config=~/run/config.json", "--out=~/again"]) == 0
    assert cli.main(["train", "--out=~/run", "--resume"]) == 0
    assert calls == [(tiny_run.CONFIG, home / "again"), (tiny_run.CONFIG, home / "run")]


def test_a_palette_in_a_home_folder(home: Path) -> None:
    words = ["palette", "~/photos", "--out=~/p.npy", "--colors=2", "--grid", "4", "4"]
    assert cli.main(words) == 0
    assert (home / "p.npy").is_file()
    assert (home / "p.png").is_file()
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out=~nobody-here/x"],
        ["train", "--data=~nobody-here/x"],
        ["train", "--palette=~nobody-here/x"],
        ["train", "--config=~nobody-here/x"],
        ["train", "--resume", "--out=~nobody-here/x"],
        ["study", "--ood", "~nobody-here/x"],
        ["study", "--out=~nobody-here/x"],
        ["evaluate", "~nobody-here/x"],
        ["evaluate", "run", "--cifar10-c=~nobody-here/x"],
        ["evaluate", "run", "--data=~nobody-here/x"],
        ["sample", "~nobody-here/x"],
        ["sample", "run", "--complete=~nobody-here/x"],
        ["palette", "~nobody-here/x", "--out=p.npy"],
        ["palette", "digits", "--out=~nobody-here/x.npy"],
    ],
)
def test_a_user_who_is_not_here(
    home: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for work in ("trainer.train", "study.runs.Study.conduct"):
        monkeypatch.setattr(f"gcrl.{work}", lambda *_, **__: pytest.fail("it began"))
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gcrl: ~nobody-here/x")
    assert "no home folder is known" in line
    assert not list(Path().iterdir())


def test_a_user_who_is_not_here_in_python() -> None:
    with pytest.raises(DataError, match="~nobody-here/x: no home folder is known"):
        load_dataset("~nobody-here/x", (4, 4))
    with pytest.raises(ConfigError, match="~nobody-here/x: no home folder is known"):
        Options(ood=("~nobody-here/x",)).validate()


@pytest.mark.parametrize("source", [".", "./", "../photos", "../photos/.", "sub/..", "~/photos/"])
def test_a_folder_has_its_name(home: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home / "photos")
    (home / "photos" / "sub").mkdir()
    assert load_dataset(source, (4, 4)).name == "photos"
    assert ood_name(source) == "photos"


def test_names_of_other_paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "link").symlink_to("photos")
    monkeypatch.chdir(home / "photos")
    assert paths.name_of("..") == "home"
    assert paths.name_of("~") == "home"
    assert paths.name_of(home / "link") == "link"
    assert paths.name_of("/") == "root"
    assert ood_name("x/set.npz") == "set"


def test_linked_files_are_part_of_a_stamp(home: Path) -> None:
    """What is measured on a folder is measured anew when a picture behind a link changes."""
    linked = Path("linked")
    linked.mkdir()
    (linked / "photos").symlink_to(home / "photos")
    (linked / "gone.png").symlink_to("nowhere")
    before = stamp("linked")
    assert len(before) == 6
    Image.new("RGB", (5, 5)).save(home / "photos" / "3.png")
    after = stamp("linked")
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


# --max-gigabytes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on ~/photos, whose own limit is far too low for them."""
    folder = tmp_path / "run"
    folder.mkdir()
    data = replace(tiny_run.CONFIG.data, data="~/photos", max_gigabytes=1e-7)
    return tiny_run.save(folder, replace(tiny_run.CONFIG, data=data))


@pytest.mark.parametrize(
    ("words", "is_asked"),
    [
        (["palette", "~/photos", "--out=p.npy", "--colors=2"], False),
        (["sample", "RUN", "--complete=~/photos", "--out=x.png"], True),
        (["evaluate", "RUN", "--parts=calibration"], True),
        (["train", "--data=~/photos"], False),
        (["study", "--data=~/photos"], False),
    ],
)
def test_every_command_that_reads_images_has_a_limit(
    home: Path, run: Path, words: list[str], is_asked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """is_asked: the limit of the run counts where none is given."""
    words = [str(run) if word == "RUN" else word for word in words]
    for flags in ([], ["--max-gigabytes=1e-7"])[not is_asked :]:
        assert cli.main([*words, *flags]) == 2
        message = capsys.readouterr().err
        assert "photos/" in message
        assert "than the 1e-07 GB that --max-gigabytes allows" in message


def test_the_limit_of_a_run_can_be_raised(
    home: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(run), "--complete=~/photos", "--max-gigabytes=1", "--device=cpu"]
    assert cli.main(words) == 0, capsys.readouterr().err
