"""Sampling with cached rows: the same draws as one full forward pass for each pixel."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_model import draw_tokens, make_model

from gcrl.sampling import complete, sample

GRIDS = [(2, 3), (3, 2), (1, 4), (4, 1), (4, 4)]


def gumbel(*shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return -(-uniform.log()).log()


@torch.no_grad()
def sample_slowly(model, noise, temperature=1.0):
    """One full forward pass for each pixel."""
    count, height, width, _ = noise.shape
    tokens = torch.zeros(count, height, width, dtype=torch.int64)
    for row, column in itertools.product(range(height), range(width)):
        logits = model.logits(tokens)[:, row, column]
        tokens[:, row, column] = (logits / temperature + noise[:, row, column]).argmax(-1)
    return tokens


@pytest.mark.parametrize("layers", [(2, 1), (4, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("grid", GRIDS)
def test_cached_sampling_draws_what_full_passes_draw(grid, temperature, layers):
    model = make_model(grid, outer_layers=layers[0], inner_layers=layers[1])
    noise = gumbel(64, *grid, 5)
    fast = sample(model, 64, temperature=temperature, noise=noise)
    assert torch.equal(fast, sample_slowly(model, noise, temperature))
    assert fast.unique(dim=0).shape[0] > 3  # the draws differ


def test_temperature_zero_takes_the_likeliest():
    model = make_model((3, 3))
    greedy = sample(model, 2, temperature=0.0)
    assert torch.equal(greedy, sample_slowly(model, torch.zeros(2, 3, 3, 5)))


def test_draws_have_the_model_s_probabilities():
    model = make_model((2, 2), colors=3, dtype=torch.float32)
    count = 20_000
    drawn = sample(model, count, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(list(itertools.product(range(3), repeat=4))).view(81, 2, 2)
    with torch.no_grad():
        expected = count * model.log_prob(images).double().exp()
    place = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    observed = place.bincount(minlength=81).double()
    common = expected >= 5
    rest = torch.stack((observed[~common].sum(), expected[~common].sum()))
    observed = torch.cat((observed[common], rest[:1]))
    expected = torch.cat((expected[common], rest[1:]))
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    degrees = len(expected) - 1
    assert degrees >= 20
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("first_row", [0, 1, 2, 3, 4])
def test_completion_keeps_the_rows_above_and_draws_what_sample_draws(first_row):
    model = make_model((4, 3))
    noise, other = gumbel(8, 4, 3, 5), gumbel(8, 4, 3, 5, seed=6)
    drawn = sample(model, 8, noise=noise)
    kept = drawn.clone()
    kept[:, first_row:] = draw_tokens(8, (4, 3))[:, first_row:]
    given = kept.clone()

    assert torch.equal(complete(model, given, first_row, noise=noise), drawn)
    assert torch.equal(given, kept)  # the input stays as it was
    anew = complete(model, given, first_row, noise=other)
    assert torch.equal(anew[:, :first_row], kept[:, :first_row])
    assert torch.equal(anew, drawn) == (first_row == 4)


def test_seeded_draws_repeat_and_complete_to_themselves():
    model = make_model((4, 3), dtype=torch.float32)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    drawn = sample(model, 8, generator=seeded(0))
    assert drawn.dtype == torch.int64
    assert torch.equal(sample(model, 8, generator=seeded(0)), drawn)
    assert not torch.equal(sample(model, 8, generator=seeded(1)), drawn)
    assert torch.equal(complete(model, drawn, 2, generator=seeded(0)), drawn)
    torch.manual_seed(0)
    assert torch.equal(sample(model, 8), drawn)


def test_encoder_runs_once_for_each_finished_row_and_decoder_once_for_each_pixel():
    model = make_model((4, 3))
    shapes: dict[str, list[tuple[int, ...]]] = {"outer": [], "inner": []}
    for name, seen in shapes.items():
        getattr(model, name)[-1].register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(tuple(x[0].shape))
        )
    sample(model, 2)
    assert shapes["outer"] == [(2, 1, 3, 12)] * 3  # nothing follows the last row
    assert shapes["inner"] == [(2, 1, 1, 12)] * 12


def test_nothing_to_draw():
    model = make_model()
    assert sample(model, 0).shape == (0, 2, 3)


def test_samples_carry_no_gradient_and_leave_the_mode_alone():
    model = make_model()
    sample(model, 1)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": -1}, "^count: expected 0 or more images, got -1"),
        ({"temperature": -0.5}, "^temperature: expected 0 or more, got -0.5"),
        ({"temperature": float("nan")}, "^temperature: expected 0 or more, got nan"),
        ({"noise": torch.zeros(2, 2, 3, 4)}, r"^noise: expected \[2, 2, 3, 5\], got \[2, 2, 3, 4"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample(make_model(), **{"count": 2, **options})


@pytest.mark.parametrize(
    ("tokens", "first_row", "error", "message"),
    [
        (draw_tokens(1), 3, ValueError, "^first_row: expected a row from 0 to 2, got 3"),
        (draw_tokens(1), -1, ValueError, "^first_row: expected a row from 0 to 2, got -1"),
        (draw_tokens(1, (3, 2)), 1, ValueError, r"^tokens: expected tokens \[B, 2, 3\]"),
        (draw_tokens(1).float(), 1, TypeError, "^tokens: expected int64"),
    ],
)
def test_wrong_completions_are_named(tokens, first_row, error, message):
    with pytest.raises(error, match=message):
        complete(make_model(), tokens, first_row)
