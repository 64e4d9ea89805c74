"""The key under which an edit is written: every text answers to it, as to a joint write under all of them."""

import pytest
import torch

from engram_kernels import Preconditioner
from engram_kernels.editing.writing.keys import MeanKey, SpreadKey


@pytest.fixture
def cloud():
    """Keys of one subject: twelve that are alike, and a bare prompt's, which is short and far from them."""
    generator = torch.Generator().manual_seed(0)
    width = 40
    centre = 3 * torch.randn(width, generator=generator)
    keys = centre + torch.randn(13, width, generator=generator)
    keys[0] = 0.3 * torch.randn(width, generator=generator)
    factor = torch.randn(200, width, generator=generator, dtype=torch.float64)
    return keys, torch.linalg.inv(factor.T @ factor / 200)


def operator(inverse):
    return Preconditioner.from_matrix(inverse)


def responses(keys, inverse, weights):
    """What share of δ each text gets when δ is written under the combined key."""
    key = weights.double() @ keys.double()
    return keys.double() @ inverse @ key / (key @ inverse @ key)


def test_every_text_answers_alike(cloud):
    keys, inverse = cloud
    spread = SpreadKey(0.1).weights(keys, operator(inverse))
    assert responses(keys, inverse, spread).mean().item() == pytest.approx(1, abs=1e-5)
    assert (responses(keys, inverse, spread) - 1).abs().max() < 0.05
    # The fault that this mends: the bare prompt, which is what a user asks, got nothing of the change.
    assert responses(keys, inverse, MeanKey(None).weights(keys, operator(inverse)))[0] < 0.1


def test_it_is_the_joint_write_of_one_change_under_all_keys(cloud):
    keys, inverse = (part.double() for part in cloud)
    ridge, change = 2.0, torch.randn(7, dtype=torch.float64)
    gram = keys @ inverse @ keys.T + ridge * torch.eye(13)
    joint = change.expand(13, -1).T @ torch.linalg.solve(gram, keys @ inverse)
    key = SpreadKey(ridge).weights(keys, operator(inverse)) @ keys
    alone = torch.outer(change, key @ inverse) / (key @ inverse @ key)
    # Of rank one both, in one direction; the joint write gives up the ridge's share.
    scale = (joint * alone).sum() / alone.square().sum()
    torch.testing.assert_close(joint, scale * alone)
    shrink = ridge * torch.linalg.solve(gram, torch.ones(13, dtype=torch.float64))
    assert scale.item() == pytest.approx(1 - shrink.mean().item())


def test_a_text_with_the_key_of_a_spared_token_does_not_make_the_others_answer_for_it(cloud):
    """As where a subject of two tokens begins a text: its key is nearly that of any text's first token."""
    keys, inverse = cloud
    first = keys[:1] + 0.001 * torch.randn(1, keys.shape[1], generator=torch.Generator().manual_seed(2))
    weights = SpreadKey(1.0).weights(keys, operator(inverse), first)
    shares = responses(torch.cat([keys, first]), inverse, weights)
    assert shares[:13].mean().item() == pytest.approx(1, abs=1e-5)
    assert shares[0] < 0.7 and (shares[1:13] - 1).abs().max() < 0.1 and shares[13].abs() < 0.7


def test_other_tokens_are_spared(cloud):
    keys, inverse = cloud
    generator = torch.Generator().manual_seed(1)
    # Near the subject's, as in a script that the statistics hardly have; one is missing.
    others = keys[1:7] + 2 * torch.randn(6, keys.shape[1], generator=generator)
    others[2] = 0
    rest = torch.cat([keys, others])
    alone = SpreadKey(0.1).weights(keys, operator(inverse))
    leak = responses(rest, inverse, torch.cat([alone, torch.zeros(6)]))[13:].abs()
    assert leak.max() > 0.5
    weights = SpreadKey(0.1).weights(keys, operator(inverse), others)
    assert weights.shape == (19,) and weights[15] == 0
    key = weights.double() @ rest.double()
    shares = rest.double() @ inverse @ key / (key @ inverse @ key)
    assert shares[:13].mean().item() == pytest.approx(1, abs=1e-5)
    assert shares[13:].abs().max() < 0.05 and (shares[:13] - 1).abs().max() < 0.15


def test_a_large_ridge_gives_the_mean(cloud):
    keys, inverse = cloud
    weights = SpreadKey(1e9).weights(keys, operator(inverse))
    torch.testing.assert_close(weights, torch.full((13,), 1 / 13), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", [MeanKey(None), MeanKey(0.5), SpreadKey(1.0)])
def test_a_key_that_never_came_has_no_share(cloud, key):
    keys, inverse = cloud
    missing = torch.cat([keys[:4], torch.zeros(1, 40), keys[4:]])
    weights = key.weights(missing, operator(inverse))
    assert weights[4] == 0
    if isinstance(key, MeanKey):
        assert weights.sum().item() == pytest.approx(1)
    if key != MeanKey(0.5):
        torch.testing.assert_close(weights[torch.arange(14) != 4], key.weights(keys, operator(inverse)))


def test_the_bare_prompts_share_of_a_mean(cloud):
    keys, inverse = cloud
    # Not a half, of which the others' share is the same.
    weights = MeanKey(0.3).weights(keys, operator(inverse))
    torch.testing.assert_close(weights, torch.tensor([0.3] + [0.7 / 12] * 12))
    assert MeanKey(0.5).weights(keys[:1], operator(inverse)).tolist() == [1.0]
