"""What the definitions share."""

import torch

from scaling_testbed.kernels import reference


def test_a_softcap_bounds_scores_keeps_their_order_and_leaves_small_ones():
    scores = torch.linspace(-200, 200, 101, dtype=torch.float64)
    capped = reference.softcap_scores(scores, 50.0)
    assert capped.abs().max() < 50 and (capped.diff() > 0).all()
    torch.testing.assert_close(reference.softcap_scores(scores / 1e4, 50.0), scores / 1e4, rtol=1e-6, atol=0)
