"""Hooks that go when their block ends, and forward passes that they end early."""

import pytest
import torch
from torch import nn

from engram_kernels.hf.hooks import Stop, capture, run_until


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, use_cache=None):
        self.use_cache = use_cache
        return self.second(self.first(input=x))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_see_and_replace_what_goes_in_and_out():
    model, x = Two(), torch.randn(2, 3)
    seen = []

    def halve(_module, arguments, keywords):
        return arguments, {"input": keywords["input"] / 2}

    def negate(_module, _arguments, output):
        seen.append(output)
        return -output

    with capture(before={model.first: halve}, after={model.first: negate}):
        assert hooks(model) == 2
        y = model(x)
    torch.testing.assert_close(seen, [model.first(x / 2)])
    torch.testing.assert_close(y, model.second(-model.first(x / 2)))
    assert hooks(model) == 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_hooks_go_after_an_error(where):
    model = Two()

    def refuse(*_arguments):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), capture(**{where: {model.first: refuse}}):
        model(torch.randn(2, 3))
    assert hooks(model) == 0


def test_a_stop_ends_the_pass_and_no_other_error_does():
    model, calls = Two(), []

    def stop(*_arguments):
        raise Stop

    with capture(before={model.second: stop}, after={model.first: lambda *_: calls.append("first")}):
        run_until(model, x=torch.randn(2, 3))
    assert calls == ["first"] and model.use_cache is False
    with capture(after={model.second: lambda *_: calls.append("second")}):
        run_until(model, x=torch.randn(2, 3), use_cache=True)
    assert calls == ["first", "second"] and model.use_cache is True
    with pytest.raises(RuntimeError):
        run_until(model, x=torch.randn(2, 5))
