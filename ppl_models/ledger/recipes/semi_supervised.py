r"""Semi-supervised classification by M2 (Kingma et al. 2014)."""

from __future__ import annotations

import torch
from pyro.infer import TraceEnum_ELBO

from ppl_models import data
from ppl_models.ledger.recipes.trained import placed, trained
from ppl_models.models.vae import SemiSupervisedVAE


def semi_supervised(quick: bool, seed: int, *, labels: int) -> dict[str, float]:
    """Test accuracy of M2 in percent, with the same number of labels per class."""
    images = data.load("mnist", binarise=True)
    few, steps, rows = (400, 20, 200) if quick else (None, 60 * 600, None)
    x, y = placed(images.train["x"][:few]), images.train["y"][:few].float()
    known = placed(data.hide_labels(y, labels, seed=seed))
    pair, _ = trained(
        lambda: SemiSupervisedVAE(images.features, 50, images.classes, auxiliary=0.1 * len(y) / 10),
        {"x": x, "y": known},
        TraceEnum_ELBO(max_plate_nesting=1),
        steps=steps,
        batch=100,
        learning_rate=0.001,
        draws=1,
        seed=seed,
    )
    with torch.no_grad():
        found = pair.probabilities(placed(images.test["x"][:rows])).argmax(-1).cpu()
        right = found == images.test["y"][:rows]
    return {"figure": 100 * float(right.double().mean()), "labels": int((~known.isnan()).sum())}
