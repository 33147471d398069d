"""How many copies of each seed a selection keeps (GIF, figure 9): seeds by their number of kept copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.reports.drawing import INK, SERIES, WIDTH, axes_of, svg
from rayexpand.reports.figure import Figure
from rayexpand.runs.status import RunView
from rayexpand.storage.tables import read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


_ROWS = 1 << 18  # whose seeds are held as strings at once


def kept_figures(view: RunView) -> dict[str, Figure]:
    """A histogram for each selection of a run, by its name."""
    names = sorted(name.removesuffix(".parquet") for name in view.files.list("selections") if name.endswith(".parquet"))
    return {name: kept_per_seed(f"kept-{number}", name, copies_kept(view, name))
            for number, name in enumerate(names, 1)}


def copies_kept(view: RunView, selection: str) -> dict[int, int]:
    """Copies kept -> seeds, from 0 to the most; a seed of which the run has no sample has 0 too."""
    table = read_table(view.files, f"selections/{selection}.parquet", ["sample_id", "keep"])
    parts = [table.slice(start, _ROWS) for start in range(0, max(1, table.num_rows), _ROWS)]
    kept = _summed(pa.concat_tables([_summed(pa.table({
        "seed": pc.replace_substring_regex(part["sample_id"], r"/[^/]*$", ""),
        "keep_sum": part["keep"].cast(pa.int64())})) for part in parts]))
    counts = {one["values"]: one["counts"] for one in pc.value_counts(kept["keep_sum"].combine_chunks()).to_pylist()}
    counts[0] = counts.get(0, 0) + view.run["seeds"] - kept.num_rows
    return {copies: counts.get(copies, 0) for copies in range(max(counts) + 1)}


def _summed(table: pa.Table) -> pa.Table:
    found = table.group_by("seed").aggregate([("keep_sum", "sum")])
    return found.rename_columns(["seed", "keep_sum"])


def kept_per_seed(name: str, selection: str, seeds: dict[int, int]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    total = sum(seeds.values())

    def draw(figure: Canvas) -> None:
        axes = axes_of(figure, "copies kept of a seed", "seeds")
        axes.bar(list(seeds), list(seeds.values()), 0.72, color=SERIES[0])
        for copies, count in seeds.items() if len(seeds) <= 16 else ():
            axes.annotate(f"{count:,}", (copies, count), (0, 3), textcoords="offset points", ha="center", color=INK)
        axes.set_ylim(0, 1.16 * max(seeds.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
    return Figure(name, svg((WIDTH, 230), draw, f"Copies kept of each seed by {selection}"), {
        "kind": "kept", "selection": selection, "n": total, "seeds_by_copies_kept": {
            str(copies): count for copies, count in seeds.items()}})
