import math

import pytest
import torch

from dvpo.core.categorical import categorical_atoms, gaussian_histogram, histogram_centres, histogram_loss
from dvpo.core.risk import cvar, trimmed_mean

F64 = torch.float64
CENTRES = histogram_centres(51, 0.0, 1.0, 0.75)


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


# The support


def test_the_support_has_its_ends_at_the_bounds_and_room_for_four_deviations_beyond():
    # sigma .75 bins: 4 * .75 = 3 more on either side; 51 bins over one unit are .02 apart.
    assert len(CENTRES) == 57
    assert len(histogram_centres(51, 0.0, 1.0, 1.0)) == 59
    torch.testing.assert_close(CENTRES[[0, 3, 4, 53, 56]], torch.tensor([-0.06, 0.0, 0.02, 1.0, 1.06], dtype=F64))


# The smoothed target


def test_a_histogram_by_hand():
    # Centres -1, 0, 1, edges -1.5, -.5, .5, 1.5, G = 0, sigma 1: Phi(.5) - Phi(-.5) in the middle over what is not cut.
    middle, all_ = 2 * phi(0.5) - 1, 2 * phi(1.5) - 1
    shares = gaussian_histogram(torch.zeros(1, dtype=F64), torch.tensor([-1.0, 0.0, 1.0], dtype=F64), 1.0)
    side = (1 - middle / all_) / 2
    torch.testing.assert_close(shares, torch.tensor([side, middle / all_, side], dtype=F64))


def test_several_atoms_are_smoothed_each_and_averaged():
    targets = torch.tensor([0.2, 0.9, 0.9, 0.4], dtype=F64)
    alone = [gaussian_histogram(atom[None], CENTRES, 0.75) for atom in targets]
    torch.testing.assert_close(gaussian_histogram(targets, CENTRES, 0.75), torch.stack(alone).mean(0))


@pytest.mark.parametrize("target", [0.0, 0.013, 0.5, 1.0])
def test_smoothing_keeps_the_mean_also_at_the_ends_of_the_support(target: float):
    shares = gaussian_histogram(torch.tensor([target], dtype=F64), CENTRES, 0.75)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares @ CENTRES) == pytest.approx(target, abs=1e-5)


def test_without_room_beyond_the_ends_the_mean_would_move_inwards():
    shares = gaussian_histogram(torch.tensor([0.0], dtype=F64), CENTRES[3:-3], 0.75)
    assert float(shares @ CENTRES[3:-3]) == pytest.approx(0.37 * 0.02, abs=1e-4)


# The loss


def test_the_loss_is_the_cross_entropy_and_its_gradient_softmax_less_target():
    logits = torch.randn(5, 2, 57, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    targets = torch.linspace(0, 1, 5, dtype=F64).unsqueeze(-1)
    shares = gaussian_histogram(targets, CENTRES, 0.75)
    losses = histogram_loss(logits, targets, CENTRES, 0.75)
    naive = [sum(torch.nn.functional.cross_entropy(logits[k, n], shares[k]) for n in range(2)) / 2 for k in range(5)]
    torch.testing.assert_close(losses, torch.stack(naive))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - shares.unsqueeze(1)) / 2)
    assert torch.autograd.gradcheck(lambda x: histogram_loss(x, targets, CENTRES, 0.75), (logits,))


def test_trained_on_sampled_returns_it_finds_their_law():
    # Returns 0 and 1, 1 with probability .3: the mean of the law learnt is .3, its lower 70% stand at 0.
    logits = torch.zeros(2, 1, 57, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    share = torch.tensor([0.7, 0.3])
    for _ in range(400):
        optimiser.zero_grad()
        both = logits[:1].expand(2, -1, -1)
        (share * histogram_loss(both, torch.tensor([[0.0], [1.0]]), CENTRES, 0.75)).sum().backward()
        optimiser.step()
    atoms = categorical_atoms(logits[0, 0].detach().softmax(-1), CENTRES, 10)
    torch.testing.assert_close(atoms, torch.tensor([0.0] * 7 + [1.0] * 3), rtol=0, atol=0.05)
    assert float(atoms.mean()) == pytest.approx(0.3, abs=1e-3)


# Atoms of equal mass


@pytest.mark.parametrize(
    ("num_atoms", "expected"),
    [
        (1, [0.75]),
        (2, [0.0, 1.5]),  # the upper half: .25 at 1, .25 at 2
        (3, [0.0, 0.5, 1.75]),  # the second third: 1/6 at 0, 1/6 at 1; the last: 1/12 at 1, 1/4 at 2
        (4, [0.0, 0.0, 1.0, 2.0]),
    ],
)
def test_atoms_by_hand(num_atoms: int, expected: list[float]):
    atoms = categorical_atoms(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, 1.0, 2.0]), num_atoms)
    torch.testing.assert_close(atoms, torch.tensor(expected))


def test_atoms_are_sorted_and_keep_the_mean_and_the_means_of_whole_tails():
    generator = torch.Generator().manual_seed(1)
    probabilities = (3 * torch.randn(40, 57, generator=generator, dtype=F64)).softmax(-1)
    atoms = categorical_atoms(probabilities, CENTRES, 20)
    assert (atoms.diff(dim=-1) >= -1e-9).all()
    torch.testing.assert_close(atoms.mean(-1), probabilities @ CENTRES)
    # The lowest quarter of the mass, bin by bin.
    before = probabilities.cumsum(-1) - probabilities
    lowest = (0.25 - before).clamp(min=0).minimum(probabilities)
    torch.testing.assert_close(cvar(atoms, 0.25), (lowest @ CENTRES) / 0.25)
    assert (trimmed_mean(atoms, 0.1, 0.1) - atoms.mean(-1)).abs().max() > 1e-3


def test_atoms_keep_their_digits_in_float32_and_probabilities_their_rounding():
    probabilities = torch.rand(7, 57, generator=torch.Generator().manual_seed(2)).softmax(-1)
    atoms = categorical_atoms(probabilities, CENTRES + 1e4, 200)
    exact = categorical_atoms(probabilities.double(), CENTRES, 200)
    assert atoms.dtype == torch.float32
    torch.testing.assert_close(atoms.double() - 1e4, exact, rtol=0, atol=2e-3)  # float32 at 1e4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: histogram_centres(1, 0.0, 1.0, 0.75), "bins >= 2"),
        (lambda: histogram_centres(5, 1.0, 1.0, 0.75), "low < high"),
        (lambda: histogram_centres(5, 0.0, 1.0, 0.0), "sigma > 0"),
        (lambda: gaussian_histogram(torch.zeros(3, 0), CENTRES, 0.75), "targets"),
        (lambda: gaussian_histogram(torch.zeros(3, 1), CENTRES, -1.0), "sigma"),
        (lambda: histogram_loss(torch.zeros(3, 1, 5), torch.zeros(3, 1), CENTRES, 0.75), "logits"),
        (lambda: histogram_loss(torch.zeros(3, 1, 57), torch.zeros(2, 1), CENTRES, 0.75), "logits"),
        (lambda: categorical_atoms(torch.ones(3), CENTRES, 4), "probabilities"),
        (lambda: categorical_atoms(torch.ones(57), CENTRES, 0), "num_atoms"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()
