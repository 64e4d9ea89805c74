"""`engram graft`: skills as files."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import EngramError
from . import learn
from .common import App, Link, Report, bars, check_folder, check_picture, reading
from .output import emit, facts, note, show, table

if TYPE_CHECKING:
    from ..grafting import Graft
    from ..grafting.plots import Grid

app = App(help="Find the few weights that carry a skill, and graft them.", no_args_is_help=True)
app.command()(learn.localize)

Folder = Annotated[str, typer.Argument(help="A graft's folder, or its name on the Hub.")]


@app.command()
def apply(
    graft: Annotated[str, typer.Option(help="The graft's folder, or its name on the Hub.")],
    out: Annotated[Path, typer.Option(help="New folder for the grafted model and its tokenizer.")],
    base: Annotated[
        str | None, typer.Option(help="The base: a name, a folder, or smollm2; default: the graft's own.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Graft even if the base's weights are others.")
    ] = False,
    link: Link = False,
) -> None:
    """Write a graft into its base model, and save the model.

    The base's files are copied and the graft written into them, one tensor at a time: a base larger than the
    memory will do. Where its files do not hold the tensors that are grafted, it is loaded.

    Example: engram graft apply --base smollm2 --graft my-skill --out my-model
    """
    from ..grafting import Graft, graft_checkpoint
    from ..hf.shards import OtherLayoutError

    check_folder("out", out)
    with reading("graft"):
        read = Graft.from_pretrained(graft)
    name = base or read.base_model
    if name is None:
        raise ValueError(f"base: expected a model, as {graft!r} does not name its own, got none")
    with bars() as progress:
        progress("graft", 0, 3, f"write into the files of {escape(name)}")
        with reading("base", "model"):
            try:
                graft_checkpoint(read, name, out, force=force, link=link)
            except OtherLayoutError:
                _load_and_save(read, name, out, force, progress)
        progress("graft", 3, 3)
    note(f"Saved {name} with {read.size:,} weights grafted to {out}.")
    emit({"out": out, "base": name, "graft": graft, "weights": read.size})


@app.command()
def inspect(
    graft: Folder,
    heat_map: Annotated[Path | None, typer.Option(help="PNG file: where the graft lies.")] = None,
) -> None:
    """Show a graft: base, size, recipe, metrics, where it lies."""
    from ..grafting import Graft, plots

    check_picture("heat_map", heat_map)
    with reading("graft"):
        read = Graft.from_pretrained(graft)
    revision = f" at {read.base_revision}" if read.base_revision else ""
    about = [
        ("base", f"{read.base_model or 'not named'}{revision}"),
        ("weights set", f"{read.size:,} ({plots.percent(read.sparsity)})"),
    ]
    for kind, found in (("recipe", read.recipe), ("metrics", read.metrics)):
        about += [(f"{kind}: {name}", _words(value)) for name, value in found.items()]
    show(facts(*about, title=graft))
    grid = plots.Grid.of(read.density())
    show(_density(grid))
    emit(
        {
            "graft": graft,
            "base": read.base_model,
            "base_revision": read.base_revision,
            "weights": read.size,
            "sparsity": read.sparsity,
            "recipe": read.recipe,
            "metrics": read.metrics,
            "layers": {plots.layer_name(layer): grid.entries(layer) for layer in grid.layers},
        }
    )
    if heat_map is not None:
        plots.heat_map(read, heat_map)


@app.command()
def diff(first: Folder, second: Folder) -> None:
    """Compare two grafts: what both set, and where they disagree."""
    from ..grafting import Graft, plots

    with reading("first"):
        one = Graft.from_pretrained(first)
    with reading("second"):
        two = Graft.from_pretrained(second)
    shared, changed = _shared(one, two)
    overlap = one.overlap(two)
    common = one.checksums.keys() & two.checksums.keys()
    same = bool(common) and all(one.checksums[name] == two.checksums[name] for name in common)
    show(
        facts(
            ("first", f"{first}: {one.size:,} weights ({plots.percent(one.sparsity)})"),
            ("second", f"{second}: {two.size:,} weights ({plots.percent(two.sparsity)})"),
            ("set by both", f"{overlap.shared:,}"),
            ("of these, to other values", f"{changed.size:,}"),
            ("Jaccard (both / either)", f"{overlap.jaccard:.4f}"),
            ("bases", "the same" if same else "different"),
        )
    )
    grids = [plots.Grid.of(graft.density()) for graft in (one, two, shared, changed)]
    names = ("first", "second", "by both", "to other values")
    layers = sorted({layer for grid in grids for layer in grid.layers})
    counts = {plots.layer_name(layer): [grid.entries(layer) for grid in grids] for layer in layers}
    by_layer = table("layer", *names, numbers=names, title="Weights set")
    for layer, entries in counts.items():
        by_layer.add_row(layer, *(f"{count:,}" for count in entries))
    show(by_layer)
    emit(
        {
            "first": {"graft": first, "weights": one.size, "sparsity": one.sparsity},
            "second": {"graft": second, "weights": two.size, "sparsity": two.sparsity},
            "set_by_both": overlap.shared,
            "to_other_values": changed.size,
            "jaccard": overlap.jaccard,
            "same_base": same,
            "layers": {layer: dict(zip(names, entries, strict=True)) for layer, entries in counts.items()},
        }
    )


app.command()(learn.curve)


def _load_and_save(graft: "Graft", name: str, out: Path, force: bool, progress: Report) -> None:
    """The same in memory, of a base whose files are laid out otherwise."""
    import torch

    from ..hf.checkpoints import save_model
    from ..hf.loading import load_model

    # The base's checksums are those of this dtype.
    dtype = next((values.dtype for values in graft.values.values()), torch.float32)
    progress("graft", 0, 3, f"load {escape(name)}")
    with reading("base"):
        model, tokenizer = load_model(name, dtype=dtype)
    progress("graft", 1, 3, "apply")
    graft.merge_and_unload(model, force)
    progress("graft", 2, 3, "save")
    save_model(model, tokenizer, out)


def _shared(one: "Graft", two: "Graft") -> tuple["Graft", "Graft"]:
    """The entries that both set, with the first one's values; and those that the second sets otherwise."""
    import torch

    from ..grafting import Graft

    for name in one.shapes.keys() & two.shapes.keys():
        if one.shapes[name] != two.shapes[name]:
            raise EngramError(
                f"second: expected a graft of the first one's architecture, got {list(two.shapes[name])} "
                f"for {list(one.shapes[name])} in {name!r}"
            )
    shared, changed = (Graft({}, {}, one.shapes | two.shapes, {}) for _ in range(2))
    for name, at in one.indices.items():
        if name in two.indices:
            mine, theirs = torch.isin(at, two.indices[name]), torch.isin(two.indices[name], at)
            value, other = one.values[name][mine], two.values[name][theirs]
            shared.indices[name], shared.values[name] = at[mine], value
            differs = value.double() != other.double()
            changed.indices[name], changed.values[name] = at[mine][differs], value[differs]
    return shared, changed


def _density(grid: "Grid") -> Table:
    """Where a graft lies: layers down, kinds of modules across."""
    from ..grafting.plots import layer_name

    table = Table(
        title="Weights set of a million (k: thousand)",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", no_wrap=True, min_width=5)
    for label in grid.labels():
        table.add_column(escape(_broken(label)), justify="right", overflow="fold", min_width=5)
    entries = {layer: f"{grid.entries(layer):,}" for layer in grid.layers}
    table.add_column("entries", justify="right", no_wrap=True, min_width=max(7, *map(len, entries.values())))
    for layer in grid.layers:
        cells = [grid.cells.get((layer, kind)) for kind in grid.kinds]
        shares = ["" if cell is None else _per_million(cell.share) for cell in cells]
        table.add_row(layer_name(layer), *shares, entries[layer])
    return table


def _broken(label: str, width: int = 10) -> str:
    """A module's name in short lines, broken at dots and underscores."""
    lines = [""]
    for part in re.split(r"(?<=[._])", label):
        if lines[-1].endswith(".") or len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line for line in lines if line)


def _per_million(share: float) -> str:
    """A share as parts in a million, in at most five characters: a narrow terminal has no room for more."""
    if share == 0:
        return "·"
    count = 1e6 * share
    return f"{count / 1e3:.0f}k" if count >= 9999.5 else f"{count:.0f}" if count >= 9.95 else f"{count:.1f}"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
