"""Hold two finished runs, or two variants, against each other: `fairway compare`.

    fairway compare quickstart/causal quickstart/leaky
    fairway compare mine other --seeds 1337 42 --html comparison.html

It says how the scores differ over the text and over the seeds that both have, where along the
stages, at what cost, and which settings differ. Every difference is B minus A.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fairway.errors import UserError
from fairway.plugins import did_you_mean
from fairway.recipe import first_names
from fairway.report.comparison import SIDES, comparison, side_by_side
from fairway.report.content import cautions
from fairway.report.render import render
from fairway.report.results import SLIDING, Results, read_results
from fairway.report.table import as_text
from fairway.report.tables import read_run
from fairway.runs import no_such_run, run_folder


class Side(NamedTuple):
    """A variant of a finished run. folders: by stage. seeds: those of the run's report."""

    run: Path
    variant: str
    folders: dict[str, str]
    seeds: list[int]

    def __str__(self) -> str:
        return f"{self.run / self.variant}"


def find_side(name: str) -> Side:
    """The variant that is named, such as `quickstart/causal`; of a run with only one, that one.

    The run is a folder, or the name of one under `results`. What variants it has, with which
    folders and seeds, its report says. Raises UserError where there is no such run, no report, no
    such variant, or several.
    """
    run, variant = _find_run(name)
    stages = read_run(run).stages
    variants = list(dict.fromkeys(stages["variant"]))
    if variant is None and len(variants) == 1:
        (variant,) = variants
    if variant not in variants:
        found = f"no variant {variant!r:.80}" if variant else f"{len(variants)} variants"
        raise UserError(
            f"{run} has {found}: name one of {first_names(variants)}, as in {run / variants[0]}"
            f"{did_you_mean(variant or '', variants)}"
        )
    own = stages[(stages["variant"] == variant) & (stages["stage"] != SLIDING)]
    folders = dict(zip(own["stage"], own["folder"], strict=True))
    return Side(run, variant, folders, sorted(set(map(int, own["seed"]))))


def _find_run(name: str) -> tuple[Path, str | None]:
    """A run's folder and, where `name` has one after it, the variant."""
    path = Path(name)
    if folder := run_folder(path):
        return folder, None
    if path.name and (folder := run_folder(path.parent)):
        return folder, path.name
    raise no_such_run(name)


def common_seeds(sides: Sequence[Side], wanted: Sequence[int] | None = None) -> list[int]:
    """The seeds that all sides have, or the wanted ones; UserError where one is missing."""
    common = [seed for seed in sides[0].seeds if all(seed in side.seeds for side in sides)]
    for seed in wanted or ():
        for side in sides:
            if seed not in side.seeds:
                raise UserError(
                    f"seed {seed} of {side} is not finished: the report of {side.run} has "
                    f"{', '.join(map(str, side.seeds))}"
                )
    if not common:
        told = "; ".join(f"{side} has {', '.join(map(str, side.seeds))}" for side in sides)
        raise UserError(f"no seed is finished on both sides: {told}")
    return list(dict.fromkeys(wanted or common))


def read_sides(sides: Sequence[Side], seeds: Sequence[int]) -> Results:
    """A and B, named so, as one run's results; files are checked as the report checks them."""
    found = {}
    for name, side in zip(SIDES, sides, strict=True):
        results = read_results(side.run, {side.variant: side.folders}, seeds)
        # One run's folder is another run's under the same name.
        folders = {stage: str(side.run / folder) for stage, folder in side.folders.items()}
        found[name] = (replace(results, folders={side.variant: folders}), side.variant)
    return side_by_side(found)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fairway compare`."""
    for name in SIDES:
        help_text = "run or run/variant: a folder, or its name under results"
        parser.add_argument(f"run_{name.lower()}", metavar=f"RUN_{name}", help=help_text)
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="only these (all that both have)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")


def run(parsed: argparse.Namespace) -> int:
    """`fairway compare`: exit status 0, whatever the difference."""
    sides = [find_side(parsed.run_a), find_side(parsed.run_b)]
    seeds = common_seeds(sides, parsed.seeds)
    results = read_sides(sides, seeds)
    facts = [*zip(SIDES, map(str, sides), strict=True), ("Seeds", ", ".join(map(str, seeds)))]
    tables, notes = comparison(results), cautions(results)
    print(*(f"{name:<5}  {text}" for name, text in facts), *notes, sep="\n")
    print(*map(as_text, tables), sep="\n")
    if parsed.html:
        content = {"facts": facts, "tables": tables, "cautions": notes}
        render(parsed.html, "compare.html.j2", content)
        print(f"\n{parsed.html}")
    return 0
