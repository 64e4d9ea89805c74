"""Other weights in a model's parameters, for a while."""

import pytest
import torch

from engram_kernels.hf.swapped_weights import swapped_weights


def test_weights_stand_within_and_the_own_ones_after():
    model = torch.nn.Linear(3, 2)
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    other = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="within"), swapped_weights(model, {"weight": other}):
        assert model.weight.data_ptr() == other.data_ptr()
        assert model.bias.data_ptr() == own["bias"].data_ptr()
        raise RuntimeError("within")
    assert all(parameter.data_ptr() == own[name].data_ptr() for name, parameter in model.named_parameters())


def test_a_callers_autocast_sees_them():
    model, x = torch.nn.Linear(3, 2, bias=False), torch.ones(1, 3)
    model.weight.data.fill_(1.0)
    # Copies of weights are kept while there are gradients.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).tolist() == [[3.0, 3.0]]
        with swapped_weights(model, {"weight": torch.full((2, 3), 2.0)}):
            assert model(x).tolist() == [[6.0, 6.0]]
        assert model(x).tolist() == [[3.0, 3.0]]
