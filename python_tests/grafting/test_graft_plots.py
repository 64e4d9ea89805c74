"""Plots of grafts: files that are whole, differ where grafts differ, and leave matplotlib alone."""

import struct
import sys

import pytest
import torch

from engram_kernels import EngramError
from engram_kernels.grafting import Graft
from engram_kernels.grafting.density import Grid, percent
from engram_kernels.grafting.plots import Point, curve, heat_map

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

KINDS = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


def fake(layers=3, seed=0, kinds=KINDS, most=40):
    """A graft with up to `most` entries in each of the matrices of 1000 weights."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {"model.norm.weight": (10,)}
    for layer in range(layers):
        for kind in kinds:
            name = f"model.layers.{layer}.{kind}"
            shapes[name] = (100, 10)
            count = int(torch.randint(most + 1, (1,), generator=generator))
            if count and "norm" not in kind:
                indices[name] = torch.randperm(1000, generator=generator)[:count].sort().values.int()
    values = {name: torch.zeros(len(at)) for name, at in indices.items()}
    return Graft(indices, values, shapes, {}, base_model="someone/some-model")


def size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_heat_map_grows_with_the_model(tmp_path):
    heat_map(fake(3), tmp_path / "3.png")
    heat_map(fake(60), tmp_path / "60.png")
    heat_map(fake(3, kinds=KINDS[:2]), tmp_path / "2.png")
    small, tall, narrow = (size(tmp_path / name) for name in ("3.png", "60.png", "2.png"))
    assert small[1] > 300 and tall[1] > 60 * 20 and tall[0] == small[0] > narrow[0] > 400
    assert len(list(tmp_path.iterdir())) == 3


def test_different_grafts_give_different_pictures(tmp_path):
    for name, graft in (
        ("a", fake(seed=1)),
        ("b", fake(seed=2)),
        ("c", fake(seed=1)),
        ("none", fake(most=0)),
    ):
        heat_map(graft, tmp_path / f"{name}.png")
    a, b, c, none = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "b", "c", "none"))
    assert a == c and len({a, b, none}) == 3


def test_a_grid_has_layers_in_order_and_short_names():
    graft = fake(12, kinds=("mlp.up.weight", "mlp.up.bias", "ln"))
    grid = Grid.of(graft.density())
    assert grid.layers == [-1, *range(12)]
    assert grid.labels() == ["model.norm", "mlp.up", "mlp.up.bias", "ln"]
    assert sum(grid.entries(layer) for layer in grid.layers) == graft.size


POINTS = [
    Point("pre", None, 0.57, 0.21),
    Point("fine-tuned", None, 0.84, 0.05),
    *(Point("learned", x, 0.8 + y, 0.06) for x in (1e-2, 1e-3, 1e-4) for y in (0.01, 0.02)),
    *(Point("random", x, 0.57, 0.2) for x in (1e-2, 1e-4)),
]


def test_curve(tmp_path):
    pictures = []
    for points in (POINTS, POINTS[2:], POINTS[:2], POINTS[:3], POINTS * 2):
        curve(points, tmp_path / "curve.png")
        assert size(tmp_path / "curve.png")[0] > 1000
        pictures.append((tmp_path / "curve.png").read_bytes())
    assert len(set(pictures[:4])) == 4
    with pytest.raises(ValueError, match="points: expected at least one"):
        curve([], tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_matplotlib_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 33)

    # To read the setting "backend" is to choose one.
    def settings():
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before, modules = settings(), set(sys.modules)
    heat_map(fake(), tmp_path / "x.png")
    assert settings() == before and "matplotlib.pyplot" not in set(sys.modules) - modules
    first = (tmp_path / "x.png").read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 3)
    heat_map(fake(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == first


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngramError, match=r"pip install 'engram_kernels\[plot\]'"):
        heat_map(fake(), tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    heat_map(fake(), tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()

    def fail(_figure, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        heat_map(fake(seed=5), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png"):
        heat_map(fake(), tmp_path / "x.jpg")


def test_percent():
    cases = {1e-5: "0.001 %", 1e-4: "0.01 %", 0.01: "1 %", 0.123: "12 %", 1.0: "100 %", 2.5e-4: "0.025 %"}
    assert {share: percent(share) for share in cases} == cases
