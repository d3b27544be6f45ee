"""Distributions of rows: scores and gradients as torch's, on raw data, for many draws and labels at once."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_models import data
from ppl_models.models.parts import distributions
from ppl_models.models.parts.distributions import LabelledGaussians, Labels

FEATURES, CLASSES = 30, 2


def raw() -> tuple[Tensor, Tensor]:
    """Columns whose means are up to 650 and down to 0.004, unstandardised."""
    tumours = data.load("breast_cancer", dtype=torch.float64)
    return tumours.train["x"], tumours.train["y"]


def parameters(x: Tensor, *draws: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mean = x.mean(0) + x.std(0) * torch.randn(*draws, CLASSES, FEATURES).to(x)
    scale = x.std(0) * (0.2 + torch.rand(*draws, CLASSES, FEATURES).to(x))
    return mean.requires_grad_(), scale.requires_grad_()


def ours(mean: Tensor, scale: Tensor, labels: Tensor) -> LabelledGaussians:
    level = (scale * (2 * torch.pi) ** 0.5).log().sum(-1)
    return LabelledGaussians(mean, 1 / scale, level, labels)


@pytest.mark.parametrize("design", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_and_gradients_on_raw_data_are_those_of_normals(design: bool, dtype, monkeypatch) -> None:
    monkeypatch.setattr(distributions, "MAX_DESIGN", 10**9 if design else 0)
    x, y = raw()
    mean, scale = parameters(x)
    expected = dist.Normal(mean[y], scale[y]).log_prob(x).sum(-1)
    slopes = torch.autograd.grad(expected.sum(), (mean, scale))
    near = [v.detach().to(dtype).requires_grad_() for v in (mean, scale)]
    found = ours(*near, y).log_prob(x.to(dtype))
    loose = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found.double(), expected, **loose)
    for slope, got in zip(slopes, torch.autograd.grad(found.sum(), near), strict=True):
        torch.testing.assert_close(got.double(), slope, **loose)


@pytest.mark.parametrize("design", [True, False])
def test_what_lies_far_from_zero_is_scored_as_well(design: bool, monkeypatch) -> None:
    monkeypatch.setattr(distributions, "MAX_DESIGN", 10**9 if design else 0)
    x, y = raw()
    # Shifted by a million standard deviations: twelve digits of the squares would cancel.
    far = x + 1e6 * x.std(0)
    mean, scale = parameters(far)
    expected = dist.Normal(mean[y], scale[y]).log_prob(far).sum(-1)
    torch.testing.assert_close(ours(mean, scale, y).log_prob(far), expected, rtol=1e-7, atol=1e-7)


def test_draws_and_enumerated_labels_stand_on_the_left() -> None:
    x, y = raw()
    mean, scale = parameters(x, 4)
    rows = torch.stack([dist.Normal(m[y], s[y]).log_prob(x).sum(-1) for m, s in zip(mean, scale, strict=True)])
    torch.testing.assert_close(ours(mean, scale, y).log_prob(x), rows)
    every = torch.arange(CLASSES)[:, None, None]
    found = ours(mean, scale, every).log_prob(x)
    assert found.shape == (CLASSES, 4, len(x))
    torch.testing.assert_close(found.gather(0, y.expand(1, 4, -1))[0], rows)


def test_draws_have_the_classes_moments() -> None:
    torch.manual_seed(1)
    mean, scale = torch.tensor([[0.0, 5.0], [-3.0, 1.0]]), torch.tensor([[1.0, 0.1], [2.0, 0.5]])
    labels = torch.tensor([1, 0, 1])
    drawn = ours(mean, scale, labels).sample((20_000,))
    assert drawn.shape == (20_000, 3, 2)
    torch.testing.assert_close(drawn.mean(0), mean[labels], atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), scale[labels], atol=0.05, rtol=0)


def test_labels_are_scored_and_drawn_as_a_categorical_does() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3).double().requires_grad_()
    y = torch.tensor([0, 2, 2, 1])
    theirs, found = dist.Categorical(logits=logits).expand([4]), Labels(logits).expand([4])
    torch.testing.assert_close(found.log_prob(y), theirs.log_prob(y))
    one, other = (torch.autograd.grad(law.log_prob(y).sum(), logits)[0] for law in (theirs, found))
    torch.testing.assert_close(one, other)
    every = found.enumerate_support()
    torch.testing.assert_close(found.log_prob(every), theirs.log_prob(every))
    many = torch.randn(5, 1, 3).double()
    wide, law = Labels(many).expand([5, 4]), dist.Categorical(logits=many).expand([5, 4])
    torch.testing.assert_close(wide.log_prob(y), law.log_prob(y))
    torch.testing.assert_close(wide.log_prob(every[:, None]), law.log_prob(every[:, None]))
    own = torch.randn(4, 3).double()
    torch.testing.assert_close(Labels(own).log_prob(y), dist.Categorical(logits=own).log_prob(y))
    torch.testing.assert_close(Labels(logits).log_prob(torch.tensor(2)), theirs.log_prob(y)[1])
    frequency = Labels(logits).sample((50_000,)).bincount(minlength=3) / 50_000
    torch.testing.assert_close(frequency.double(), logits.softmax(-1).detach(), atol=0.01, rtol=0)
