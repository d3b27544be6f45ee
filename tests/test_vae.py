"""Variational autoencoders: what they score, what is refused, that they learn, and their pictures."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer import config_enumerate as enumerated
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from inference import fit, log_evidence, prior_predictive
from inference.core.bound import bind
from inference.core.handlers import isolated
from inference.draws.scoring import log_joint
from ppl_models import data
from ppl_models.models.parts import grids
from ppl_models.models.parts.networks import conv_decoder, conv_encoder
from ppl_models.models.vae import LIKELIHOODS, VAE, ConditionalVAE, HierarchicalVAE, SemiSupervisedVAE
from ppl_models.zoo import pictures

DIGITS = data.load("digits", binarise=True)
X = DIGITS.train["x"]


def small(likelihood: str = "bernoulli", features: int = 6, factors: int = 2, **arguments) -> VAE:
    torch.manual_seed(3)
    return VAE(features, factors, likelihood=likelihood, hidden=(5,), **arguments).double()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_elbo_is_the_one_by_hand(likelihood: str) -> None:
    pair, x = small(likelihood), torch.rand(7, 6).double()
    if likelihood == "gaussian":
        pair.noise = torch.tensor(0.3).double()
    with isolated(1), torch.no_grad():
        got = Trace_ELBO().loss(pair.model, pair.guide, x)
    with isolated(1), torch.no_grad():
        loc, log_scale = pair.encoder(x).chunk(2, -1)
        noise = torch.randn(7, 2, dtype=torch.float64)
        z = loc + log_scale.exp() * noise
        out = pair.decoder(z)
        q = (-0.5 * noise**2 - log_scale - 0.5 * math.log(2 * math.pi)).sum()
        p = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum()
        score = -binary_cross_entropy_with_logits(out, x, reduction="sum")
        if likelihood == "gaussian":
            score = (-0.5 * (x - out) ** 2 / 0.3 - 0.5 * math.log(2 * math.pi * 0.3)).sum()
        if likelihood == "continuous_bernoulli":
            # Its normaliser is 2 atanh(1 - 2 p) / (1 - 2 p) at the probability p.
            p1 = out.sigmoid()
            score += (2 * torch.atanh(1 - 2 * p1) / (1 - 2 * p1)).log().sum()
    assert got == pytest.approx(float(q - p - score), rel=1e-6)


def test_grey_pixels_are_scored_and_means_decoded() -> None:
    pair, z = small(), torch.randn(3, 2).double()
    torch.testing.assert_close(pair.decode(z), pair.decoder(z).sigmoid())
    grey = torch.full((3, 6), 0.25).double()
    by_hand = 0.25 * pair.decoder(z) - softplus(pair.decoder(z))
    torch.testing.assert_close(pair.likelihood(z).log_prob(grey), by_hand.sum(-1))


def test_it_learns_digits_and_says_which_factors_are_active() -> None:
    torch.manual_seed(0)
    pair = VAE(64, 10, hidden=(100,))
    result = fit(pair, X, steps=1500, batch=100, learning_rate=0.005, draws=1, progress=False)
    bound = result.losses[-100:].mean() / len(X)
    independent = X.mean(0).clamp(1e-3, 1 - 1e-3)
    base = -(X * independent.log() + (1 - X) * (1 - independent).log()).sum(-1).mean()
    # Pixels one by one cost 25 nats; the guide of a VAE that has collapsed finds no more than that.
    assert bound < float(base) - 5
    found = result.diagnosis.latent_kl
    active = found["active"].to_numpy()
    assert 3 <= active.sum() <= 10
    assert found["kl"][active].min() > found["kl"][~active].max() or active.all()
    with torch.no_grad():
        spread = pair.encode(X).var(0).numpy()
    assert np.array_equal(pair.active(X).numpy(), spread > 0.01)
    # The fit looks at a thousand rows.
    assert found["variance"].to_numpy() == pytest.approx(spread, rel=0.2, abs=0.005)
    assert 0.02 < float((prior_predictive(pair, X[:5], draws=50)["x"]).mean()) < 0.9


def test_prior_draws_come_without_data() -> None:
    draws = prior_predictive(small(), size=5, draws=20)
    assert draws["x"].shape == (20, 5, 6)
    assert set(draws["x"].unique().tolist()) <= {0.0, 1.0}


def test_two_layers_score_as_by_hand() -> None:
    torch.manual_seed(4)
    pair = HierarchicalVAE(6, (3, 2), hidden=(5,), between=(4,)).double()
    x = (torch.rand(7, 6) > 0.5).double()

    def split(out: Tensor) -> torch.distributions.Normal:
        loc, log_scale = out.chunk(2, -1)
        return torch.distributions.Normal(loc, log_scale.exp())

    with isolated(1), torch.no_grad():
        got = Trace_ELBO().loss(pair.model, pair.guide, x)
    with isolated(1), torch.no_grad():
        low = split(pair.encoder(x))
        z = low.rsample()
        high = split(pair.rising[0](z))
        top = high.rsample()
        q = low.log_prob(z).sum() + high.log_prob(top).sum()
        p = torch.distributions.Normal(0.0, 1.0).log_prob(top).sum() + split(pair.falling[0](top)).log_prob(z).sum()
        score = -binary_cross_entropy_with_logits(pair.decoder(z), x, reduction="sum")
        mean = split(pair.rising[0](low.mean)).mean
        torch.testing.assert_close(pair.encode(x), mean)
        torch.testing.assert_close(pair.decode(mean), pair.decoder(split(pair.falling[0](mean)).mean).sigmoid())
    assert got == pytest.approx(float(q - p - score), rel=1e-9)
    assert list(fit(pair, x, steps=0, draws=3, progress=False).draws) == ["z_2", "z_1"]


def test_three_layers_learn() -> None:
    torch.manual_seed(0)
    pair = HierarchicalVAE(64, (16, 8, 4), hidden=(100,), between=(32,))
    result = fit(pair, X, steps=1000, batch=100, learning_rate=0.005, draws=1, progress=False)
    independent = X.mean(0).clamp(1e-3, 1 - 1e-3)
    base = -(X * independent.log() + (1 - X) * (1 - independent).log()).sum(-1).mean()
    assert result.losses[-100:].mean() / len(X) < float(base) - 4
    assert result.diagnosis.latent_kl["active"]["z_1[0]":].sum() >= 3


def test_a_conditional_vae_reads_the_label_after_x_and_z() -> None:
    torch.manual_seed(6)
    pair, x, y = ConditionalVAE(6, 2, 3, hidden=(4,)).double(), (torch.rand(5, 6) > 0.5).double(), torch.arange(5) % 3
    with isolated(2), torch.no_grad():
        got = Trace_ELBO().loss(pair.model, pair.guide, x=x, y=y)
    with isolated(2), torch.no_grad():
        one_hot = torch.eye(3).double()[y]
        loc, log_scale = pair.encoder(torch.cat([x, one_hot], -1)).chunk(2, -1)
        law = torch.distributions.Normal(loc, log_scale.exp())
        z = law.rsample()
        p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        score = -binary_cross_entropy_with_logits(pair.decoder(torch.cat([z, one_hot], -1)), x, reduction="sum")
    assert got == pytest.approx(float(law.log_prob(z).sum() - p - score), rel=1e-9)


def test_a_conditional_vae_draws_the_class_that_it_is_asked_for() -> None:
    torch.manual_seed(0)
    train, test = DIGITS.train, DIGITS.test
    pair = ConditionalVAE(64, 10, 10, hidden=(100,))
    fit(pair, train, steps=1500, batch=100, learning_rate=0.005, draws=1, progress=False)
    judge = LogisticRegression(max_iter=500).fit(train["x"].numpy(), train["y"].numpy())
    assert judge.score(test["x"].numpy(), test["y"].numpy()) > 0.85
    drawn = prior_predictive(pair, {"y": test["y"]}, draws=3)["x"]
    right = [judge.score(x.numpy(), test["y"].numpy()) for x in drawn]
    # By chance a tenth.
    assert np.mean(right) > 0.75
    with torch.no_grad():
        images, _ = grids.by_class(pair, 6)
    assert images.shape == (10, 6, 64)
    asked = np.arange(10).repeat(6)
    assert judge.score(images.reshape(60, 64).numpy(), asked) > 0.75


@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (27, 20), (5, 7)])
def test_convolutions_keep_shapes_and_leading_dimensions(shape) -> None:
    torch.manual_seed(0)
    pixels = shape[0] * shape[1]
    encoder, decoder = conv_encoder(shape, 6), conv_decoder(3, shape)
    x, z = torch.rand(2, 1, 5, pixels), torch.randn(2, 1, 5, 3)
    assert encoder(x).shape == (2, 1, 5, 6)
    assert decoder(z).shape == (2, 1, 5, pixels)
    torch.testing.assert_close(encoder(x)[1, 0, 3], encoder(x[1, 0, 3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(z)[1, 0, 3], decoder(z[1, 0, 3]), rtol=1e-4, atol=1e-5)


def test_a_pixel_reaches_the_code_from_where_it_is() -> None:
    """Rows are read as images, line by line: a convolution sees neighbours."""
    torch.manual_seed(0)
    first = conv_encoder((8, 8), 4).inner[0]
    image = torch.zeros(1, 64)
    image[0, 3 * 8 + 5] = 1.0
    with torch.no_grad():
        seen = (first(image.reshape(-1, 1, 8, 8)) - first(torch.zeros(1, 1, 8, 8))).abs().sum(1)[0]
    # Line 3, column 5, halved and rounded to both sides.
    assert (seen > 0).nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]


def test_a_convolutional_vae_learns() -> None:
    torch.manual_seed(0)
    shape = (8, 8)
    pair = VAE(
        64, 8, encoder=conv_encoder(shape, 16, channels=(8, 16)), decoder=conv_decoder(8, shape, channels=(16, 8))
    )
    result = fit(pair, X, steps=600, batch=100, learning_rate=0.005, draws=1, progress=False)
    independent = X.mean(0).clamp(1e-3, 1 - 1e-3)
    base = -(X * independent.log() + (1 - X) * (1 - independent).log()).sum(-1).mean()
    assert result.losses[-100:].mean() / len(X) < float(base) - 4


def labelled() -> tuple[SemiSupervisedVAE, Tensor, Tensor]:
    torch.manual_seed(5)
    pair = SemiSupervisedVAE(6, 2, 3, hidden=(4,), auxiliary=2.5).double()
    return pair, (torch.rand(5, 6) > 0.5).double(), torch.tensor([0.0, torch.nan, 2.0, torch.nan, 1.0]).double()


def test_m2_sums_missing_labels_out_and_is_certain_of_known_ones() -> None:
    pair, x, y = labelled()
    with isolated(0), torch.no_grad():
        objective = TraceEnum_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
        losses = [objective.loss(enumerated(pair.model), pair.guide, x=x, y=y) for _ in range(40)]
    expected = 0.0
    with torch.no_grad():
        for row, label in zip(x, y, strict=True):
            q = pair.classifier(row).softmax(-1)
            classes = range(3) if label.isnan() else [int(label)]
            for k in classes:
                one_hot = torch.eye(3).double()[k]
                loc, log_scale = pair.encoder(torch.cat([row, one_hot])).chunk(2, -1)
                noise = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
                z = loc + log_scale.exp() * noise
                out = pair.decoder(torch.cat([z, one_hot.expand(4000, 3)], -1))
                score = -binary_cross_entropy_with_logits(out, row.expand_as(out), reduction="none").sum(-1).mean()
                divergence = 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
                inner = score - divergence - math.log(3)
                expected += float(q[k] * (inner - q[k].log()) if label.isnan() else inner + 2.5 * q[k].log())
    error = np.std(losses) / 40**0.5
    assert np.mean(losses) == pytest.approx(-expected, abs=6 * error)
    assert error < 0.05


def test_m2_knows_its_labels_without_a_guide() -> None:
    torch.manual_seed(5)
    pair = SemiSupervisedVAE(6, 2, 3, hidden=(4,), auxiliary=0.0).double()
    x, z = (torch.rand(1, 6) > 0.5).double(), torch.randn(1, 1, 2).double()

    def score(label: float) -> Tensor:
        given = bind(pair.model, {"x": x, "y": torch.tensor([label]).double()})
        with isolated(), torch.no_grad():
            return log_joint(given, {"z": z})

    known = torch.stack([score(k) for k in range(3)])
    assert float(known.std()) > 0.01
    torch.testing.assert_close(known.logsumexp(0), score(math.nan))


def test_m2_learns_from_few_labels_and_many_rows() -> None:
    x, truth = DIGITS.train["x"], DIGITS.train["y"]
    known = torch.cat([(truth == k).nonzero()[:10, 0] for k in range(10)])
    y = torch.full((len(x),), torch.nan)
    y[known] = truth[known].float()
    torch.manual_seed(0)
    pair = SemiSupervisedVAE(64, 10, 10, hidden=(100,))
    result = fit(pair, {"x": x, "y": y}, steps=400, batch=200, learning_rate=0.005, draws=1, progress=False)
    assert result.method == "SVI (TraceEnum_ELBO)"
    with torch.no_grad():
        right = pair.probabilities(DIGITS.test["x"]).argmax(-1) == DIGITS.test["y"]
    # The classifier alone, on the hundred labels, is right on 84 % (logistic regression).
    assert float(right.double().mean()) > 0.8


REFUSED = [
    (lambda: HierarchicalVAE(6, (3,)), r"factors: expected a sequence of positive integers, at least 2, got \(3,\)"),
    (lambda: fit(ConditionalVAE(6, 2, 3), torch.rand(4, 6)), "y: expected the label of every row, got none"),
    (
        lambda: fit(ConditionalVAE(6, 2, 3), {"x": torch.rand(4, 6), "y": torch.tensor([0, 1, 2, 3])}),
        "y: expected labels 0 to 2, got 3",
    ),
    (lambda: SemiSupervisedVAE(6, 2, 1), "classes: expected at least 2, got 1"),
    (lambda: SemiSupervisedVAE(6, 2, 3, auxiliary=-1.0), "auxiliary: expected zero or a positive number, got -1.0"),
    (lambda: SemiSupervisedVAE(6, 2, 3, encoder=nn.Linear(6, 4)), "encoder: expected inputs of width 9, got an error"),
    (
        lambda: labelled()[0].check(labelled()[1], torch.ones(5).long()),
        "y: expected floats, with nan where the label is missing, got integers",
    ),
    (
        lambda: fit(labelled()[0], {"x": labelled()[1], "y": torch.full((5,), 7.0)}),
        "y: expected labels 0 to 2, .*, got 7",
    ),
    (lambda: VAE(6, 2, likelihood="poisson"), "likelihood: expected one of bernoulli, continuous_bernoulli, gaussian"),
    (lambda: VAE(6, 2, encoder=nn.Linear(6, 3)), r"encoder: expected outputs of width 4, got \(1, 3\)"),
    (lambda: VAE(6, 2, decoder=nn.Linear(2, 5)), r"decoder: expected outputs of width 6, got \(1, 5\)"),
    (lambda: VAE(6, 2, encoder=nn.Linear(5, 4)), "encoder: expected inputs of width 6, got an error"),
    (lambda: fit(small(), torch.full((9, 6), 1.5).double()), r"x: expected pixels in \[0, 1\] for a bernoulli .* 1.5"),
    (lambda: fit(small(), torch.rand(9, 5).double()), r"x: expected \(rows, 6\), got \(9, 5\)"),
    (lambda: grids.manifold(small(factors=3)), "factors: expected 2 for a manifold, got 3"),
    (lambda: pictures.draw((torch.zeros(1, 1, 6), ""), (2, 2)), "shape: expected 6 pixels, got 2 x 2"),
]


@pytest.mark.parametrize(("call", "line"), REFUSED, ids=[line[:24] for _, line in REFUSED])
def test_bad_input_gets_one_line(call, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        call()
    assert "\n" not in str(error.value)


class Echo(nn.Module):
    """A pair whose code is the image itself."""

    factors = 4

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("origin", torch.zeros(4))

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


def test_grids_show_what_they_say() -> None:
    pair, x = Echo(), torch.rand(30, 4)
    x[:, 2] *= 100
    samples, _ = grids.prior_samples(pair, 5, 7)
    assert samples.shape == (5, 7, 4)
    again, _ = grids.reconstructions(pair, x, columns=6)
    assert again.shape == (8, 6, 4)
    assert torch.equal(again[0], again[1]) and torch.equal(again[0, 0], x[0]) and torch.equal(again[6, 5], x[-1])
    assert len(again[::2].flatten(0, 1).unique(dim=0)) == 24
    moved, _ = grids.traversals(pair, x, columns=3, rows=2)
    assert torch.equal(moved[0, :, 2], torch.tensor([-3.0, 0.0, 3.0]))
    assert torch.equal(moved[0][:, [0, 1, 3]], x[0, [0, 1, 3]].expand(3, -1))


def test_prior_samples_of_layers_are_draws_of_the_model(monkeypatch) -> None:
    torch.manual_seed(0)
    pair = HierarchicalVAE(16, (3, 2))
    with torch.no_grad():
        for p in pair.parameters():
            p.mul_(3)
        # The top layer says nothing of the one below: through means all images would be the same.
        pair.falling[0][-1].weight.zero_()
        pair.falling[0][-1].bias.zero_()
        monkeypatch.setattr(grids.prior_samples, "__defaults__", (200, 50))
        shown, _ = pair.pictures(torch.rand(20, 16).round())["prior"]
        expected = torch.stack([pair.likelihood(z).mean for z in torch.randn(10_000, 3).split(1000)]).flatten(0, 1)
    for moment in (Tensor.mean, Tensor.std):
        torch.testing.assert_close(moment(shown.flatten(0, 1), 0), moment(expected, 0), rtol=0, atol=0.02)
    assert float(expected.std(0).max()) > 0.1


def test_a_drawn_grid_has_each_image_in_its_place() -> None:
    images = torch.zeros(2, 3, 4)
    images[1, 2] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    figure = pictures.draw((images, "title"), (2, 2))
    sheet = figure.axes[0].images[0].get_array()
    assert sheet.shape == (8, 12)
    ink = np.argwhere(np.asarray(sheet) == 0).tolist()
    assert ink == [[5, 9], [6, 10]]


def test_pictures_are_written_as_files(tmp_path) -> None:
    paths = pictures.save(small(features=6), {"x": torch.rand(20, 6).double()}, (2, 3), tmp_path)
    assert [p.name for p in paths] == ["prior.png", "reconstructions.png", "traversals.png", "manifold.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_a_gradient_reaches_both_networks() -> None:
    pair = small()
    with isolated(0):
        Trace_ELBO().loss_and_grads(pair.model, pair.guide, torch.rand(8, 6).double())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.parameters())
    pyro.clear_param_store()


def test_log_evidence_of_labelled_rows_is_without_the_term_that_trains_the_classifier() -> None:
    """The same with alpha = 50 and with none."""
    pair, x, y = labelled()
    found = []
    for weight in (50.0, 0.0):
        pair.auxiliary = weight
        found.append(log_evidence(pair, {"x": x, "y": y}, k=50, progress=False).values)
    torch.testing.assert_close(found[0], found[1])
