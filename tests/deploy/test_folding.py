"""BatchNorm folded into the convolutions: the model predicts the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rollouts import rollout_inputs

from avfast.deploy.folding import fold_batch_norms
from avfast.models.avmodel import AVModel
from avfast.models.networks import BatchNorm

MakeModel = Callable[..., AVModel]


def test_folded_model_predicts_the_same(random_model: MakeModel):
    model = random_model()
    folded = fold_batch_norms(model)
    assert not [m for m in folded.modules() if isinstance(m, BatchNorm)]
    arrays = [torch.from_numpy(x) for x in rollout_inputs(2, 48, 1, total=8)]
    for ours, theirs in zip(folded.predict(*arrays), model.predict(*arrays), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    # and folding matters: without the statistics the frames would be others
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.zero_()
    assert (model.predict(*arrays).frames - folded.predict(*arrays).frames).abs().max() > 1e-3
