"""What layers.parquet tells of the quantizer, matrix by matrix."""

import pandas as pd

from fairway.report.format import NONE, bits, count, decimals
from fairway.report.results import Results
from fairway.report.table import Cell, Group, Row, Table

KEYS = ["bank", "matrix"]
ROUNDED = "error_round_to_nearest"
"""A column of quantizers that compare themselves with rounding."""


def matrices(results: Results, variant: str) -> pd.DataFrame:
    """The columns of numbers, mean over seeds: one row for each bank and matrix, in their order."""
    tables = [results.layers[variant, seed] for seed in results.seeds]
    every = pd.concat(tables).groupby(KEYS, sort=False)
    return every.mean(numeric_only=True)


def quantized_runs(results: Results) -> dict[tuple[str, ...], pd.DataFrame]:
    """`matrices` of each run of gptq, by the variants that share it."""
    every = dict.fromkeys(results.sharers(variant, "gptq") for variant in results.variants)
    return {sharers: matrices(results, sharers[0]) for sharers in every}


def quantization_table(results: Results) -> Table:
    """Bits, zeros and errors by bank; of many runs of gptq in all."""
    runs, groups = quantized_runs(results), []
    for sharers, table in runs.items():
        name = results.name_of(sharers, "gptq")
        if results.has_few_variants:
            banks = table.groupby("bank", sort=False)
            rows = [_row(bank, one) for bank, one in banks] + [_row("all", table)]
            groups.append(Group(rows, Cell(name) if len(runs) > 1 else None))
        else:
            groups.append(Group([_row(name, table)]))
    return Table(
        "Quantized matrices",
        "Mean over a bank’s matrices and over seeds. Bits: the entropy of a code, as the range "
        "coder has it. Error: the quantizer’s own measure, of GPTQ tr((W−Q)·H·(W−Q)ᵀ), and its "
        "share of that of rounding to the nearest. Zeros: codes that are zero, in all matrices.",
        ["Bank", "#Matrices", "#Bits a code", "#Error", "#Of rounding’s", "#Zeros"],
        groups,
    )


def _row(name: str, table: pd.DataFrame) -> Row:
    error = table["error"].mean()
    share = f"{error / table[ROUNDED].mean():.0%}" if ROUNDED in table else NONE
    return [
        name,
        count(len(table)),
        decimals(table["bits_per_code"].mean(), 2),
        bits(error),
        share,
        count(table["zeros"].sum()),
    ]
