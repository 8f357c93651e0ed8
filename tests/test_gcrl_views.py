"""The two views: what may change in each, per image, and which settings are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gcrl.config import ViewsConfig
from gcrl.views import check_pair, make_views, strong_view, validate, weak_view

PLAIN = ViewsConfig(
    weak_shift=0, flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0, grayscale=0.0, blur=0.0
)
STRONG = ViewsConfig(flip=True, crop_scale=(0.08, 1.0), color_jitter=1.0, blur=0.5)


def random_images(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def shifted_copies(image: np.ndarray, reach: int, flip: bool) -> set[bytes]:
    """Every crop of the reflect-padded image."""
    height, width, _ = image.shape
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    crops = [
        padded[top : top + height, left : left + width]
        for top in range(2 * reach + 1)
        for left in range(2 * reach + 1)
    ]
    return {crop.tobytes() for crop in crops + [crop[:, ::-1] for crop in crops if flip]}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_weak_view_is_a_shifted_copy(reach: int, flip: bool) -> None:
    image = random_images(1, 5, 7)
    config = replace(PLAIN, weak_shift=reach, flip=flip, grayscale=0.5)
    weak, _ = make_views(image.expand(400, -1, -1, -1), config)
    assert weak.dtype == torch.uint8
    seen = {view.numpy().tobytes() for view in weak}
    possible = shifted_copies(image[0].numpy(), reach, flip)
    assert seen <= possible
    assert len(seen) > 0.9 * len(possible)  # of 98 at most, in 400 draws


def test_strong_view_without_steps_is_the_image() -> None:
    images = random_images(8)
    _, strong = make_views(images, replace(PLAIN, weak_shift=1))
    assert strong.dtype == torch.float32
    torch.testing.assert_close(strong, images.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "fraction"),
    [
        ({"crop_scale": (0.08, 0.9)}, 1.0),
        ({"flip": True}, 0.5),
        ({"color_jitter": 0.5}, 0.8),
        ({"grayscale": 0.2}, 0.2),
        ({"blur": 0.5}, 0.5),
    ],
)
def test_each_step_changes_its_share_of_the_images(
    setting: dict[str, object], fraction: float
) -> None:
    torch.manual_seed(0)
    images = random_images(1).expand(1000, -1, -1, -1)
    _, strong = make_views(images, replace(PLAIN, weak_shift=1, **setting))
    changed = (strong - images.float()).abs().amax(dim=(1, 2, 3)) > 0.5
    assert changed.float().mean().item() == pytest.approx(fraction, abs=0.06)


@pytest.mark.parametrize(
    "setting", [{"crop_scale": (0.08, 0.9)}, {"color_jitter": 0.5}, {"blur": 1.0}]
)
def test_strong_view_draws_per_image(setting: dict[str, object]) -> None:
    images = random_images(1).expand(64, -1, -1, -1)
    _, strong = make_views(images, replace(PLAIN, weak_shift=1, **setting))
    changed = (strong - images.float()).abs().amax(dim=(1, 2, 3)) > 0.5
    assert len({view.numpy().tobytes() for view in strong[changed]}) > 0.9 * changed.sum()


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 24)])
@pytest.mark.parametrize("extreme", [0, 255, None])
def test_views_stay_in_range(size: tuple[int, int], extreme: int | None) -> None:
    images = random_images(64, *size) if extreme is None else torch.full((64, *size, 3), extreme)
    config = replace(STRONG, color_jitter=2.5, grayscale=0.2)
    weak, strong = make_views(images.to(torch.uint8), config)
    assert weak.shape == strong.shape == (64, *size, 3)
    assert strong.isfinite().all()
    assert strong.min() >= 0
    assert strong.max() <= 255


def test_crop_fills_the_whole_view() -> None:
    """No border of another colour: a grey image stays grey wherever it is cropped."""
    images = torch.full((256, 16, 16, 3), 100, dtype=torch.uint8)
    _, strong = make_views(images, replace(PLAIN, crop_scale=(0.08, 1.0)))
    torch.testing.assert_close(strong, images.float(), rtol=0, atol=1e-3)


def test_crop_keeps_the_aspect_of_a_long_grid() -> None:
    """Crops of an 8x32 grid are about four times as wide as high."""
    ramp = torch.arange(32).mul(8).to(torch.uint8)
    images = ramp[None, None, :, None].expand(256, 8, 32, 3)
    _, strong = make_views(images, replace(PLAIN, crop_scale=(0.25, 0.25)))
    kept = (strong[:, 0, -1, 0] - strong[:, 0, 0, 0]) / 8 + 1  # columns that the crop spans
    assert kept.min() >= 32 * (0.25 * 3 / 4) ** 0.5 - 1
    assert kept.max() <= 32 * (0.25 * 4 / 3) ** 0.5 + 1


def test_views_follow_the_global_seed() -> None:
    images = random_images(32)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(make_views(images, STRONG))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


def test_views_leave_the_images_alone() -> None:
    images = random_images(8)
    before = images.clone()
    make_views(images, STRONG)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("setting", "grid", "field"),
    [
        ({"weak_shift": -1}, (16, 16), "weak_shift: expected 0 to 15"),
        ({"weak_shift": 8}, (8, 32), "weak_shift: expected 0 to 7"),
        ({"crop_scale": (0.0, 1.0)}, (16, 16), "crop_scale: expected two shares"),
        ({"crop_scale": (0.9, 0.3)}, (16, 16), "crop_scale: expected two shares"),
        ({"crop_scale": (0.3, 1.1)}, (16, 16), "crop_scale: expected two shares"),
        ({"crop_scale": (float("nan"), 1.0)}, (16, 16), "crop_scale: expected two shares"),
        ({"crop_scale": (0.003, 1.0)}, (16, 16), "crop_scale: 0.003 of a grid of 16x16"),
        ({"color_jitter": -0.1}, (16, 16), "color_jitter: expected 0 to 2.5"),
        ({"color_jitter": 2.6}, (16, 16), "color_jitter: expected 0 to 2.5"),
        ({"grayscale": 1.1}, (16, 16), "grayscale: expected a probability"),
        ({"blur": -0.1}, (16, 16), "blur: expected a probability"),
        ({"blur": 0.5, "weak_shift": 1}, (2, 2), "blur: its kernel of 3"),
    ],
)
def test_meaningless_settings_are_refused(
    setting: dict[str, object], grid: tuple[int, int], field: str
) -> None:
    config = replace(ViewsConfig(), **setting)
    with pytest.raises(ValueError, match=field):
        validate(config, grid)
    with pytest.raises(ValueError, match=field):
        make_views(random_images(2, *grid), config)


def test_two_equal_views_are_refused() -> None:
    with pytest.raises(ValueError, match="always the same"):
        check_pair(PLAIN)
    with pytest.raises(ValueError, match="always the same"):
        make_views(random_images(2), PLAIN)
    check_pair(replace(PLAIN, flip=True))


def test_one_view_may_be_the_image_itself() -> None:
    images = random_images(4)
    validate(PLAIN, (16, 16))
    assert torch.equal(weak_view(images, PLAIN), images)
    torch.testing.assert_close(strong_view(images, PLAIN), images.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images: expected uint8 \[B, H, W, 3\], got"):
        make_views(images, ViewsConfig())
