r"""Classification with few labels by M2 (Kingma et al. 2014)."""

from __future__ import annotations

import torch
from pyro.infer import TraceEnum_ELBO

from inference import fit, isolated
from ppl_models import data
from ppl_models.models.vae import SemiSupervisedVAE


def semi_supervised(quick: bool, seed: int, *, labels: int) -> dict[str, float]:
    """Test accuracy of M2 in percent, with as many labels of each class."""
    images = data.load("mnist", binarise=True)
    few, steps, rows = (400, 20, 200) if quick else (None, 60 * 600, None)
    x, y = images.train["x"][:few], images.train["y"][:few].float()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    each = labels // len(images.classes)
    known = torch.cat([order[y[order] == k][:each] for k in range(len(images.classes))])
    given = torch.full_like(y, torch.nan)
    given[known] = y[known]
    with isolated(seed):
        pair = SemiSupervisedVAE(images.features, 50, images.classes, auxiliary=0.1 * len(y) / 10)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    fit(pair, {"x": x, "y": given}, objective, steps=steps, batch=100, learning_rate=0.001, draws=1, seed=seed)
    with torch.no_grad():
        right = pair.probabilities(images.test["x"][:rows]).argmax(-1) == images.test["y"][:rows]
    return {"figure": 100 * float(right.double().mean()), "labels": len(known)}
