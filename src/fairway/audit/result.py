"""What an audit found: the verdicts, what they mean, and audit.json."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, model_validator

from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, UNDECIDED, Check
from fairway.settings import Fault

GRAVITY = (FAIL, UNDECIDED, NOT_RUN, PASS)
"""The verdicts that count for the overall one, gravest first."""

FIXED = "fixed"
"""The track of an evaluator that scores with the plain model's distributions."""

ADAPTIVE = "adaptive"
"""The track of an evaluator that adapts to the text."""

UNKNOWN = "unknown"
"""The track where no evaluator without adaptation was given to compare with."""


class AuditRecord(BaseModel):
    """audit.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    verdict: Literal["PASS", "FAIL", "UNDECIDED", "NOT RUN"]
    variant: str | None
    """Folder of the stage, where it is one of a run."""
    seed: int
    track: Literal["fixed", "adaptive", "unknown"]
    checks: list[Check]
    not_run: list[str]
    not_applicable: list[str]
    parameters: dict[str, Any]
    detectable_leak_rate_99: float | None
    meaning_of_pass: str

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        found = {check.verdict for check in self.checks} & set(GRAVITY)
        if not found or self.verdict != _overall_verdict(found):
            raise Fault(f"found the verdict {self.verdict}, expected the gravest of its checks'")
        return self


def _overall_verdict(found: Iterable[str]) -> str:
    return next(verdict for verdict in GRAVITY if verdict in found)


@dataclass(frozen=True)
class AuditResult:
    """The checks of one audit. `print(result)` shows them.

    reach: the table of `flip.reach_table`. track: `fixed`, `adaptive` or `unknown`.
    detectable_leak_rate_99: share of leaking tokens that the flips would have shown with 99 %
        probability; None without flips.
    meaning_of_pass: what a PASS says and what it does not.
    parameters: settings, geometry and whatever else the audit was done with.
    seconds: how long each part took.
    """

    checks: tuple[Check, ...]
    reach: pd.DataFrame
    track: str
    detectable_leak_rate_99: float | None
    meaning_of_pass: str
    parameters: dict[str, Any]
    seconds: dict[str, float]

    @property
    def verdict(self) -> str:
        """FAIL where any check fails, UNDECIDED where any cannot tell, NOT RUN where any was left
        out, else PASS. A check that does not apply to the evaluator has no part in it."""
        return _overall_verdict({check.verdict for check in self.checks})

    def names(self, verdict: str) -> list[str]:
        """The checks with this verdict."""
        return [check.name for check in self.checks if check.verdict == verdict]

    def with_checks(self, *checks: Check, **parameters: Any) -> "AuditResult":
        """A copy with more checks and parameters, such as lineage and budgets."""
        return replace(
            self, checks=(*self.checks, *checks), parameters=self.parameters | parameters
        )

    def content(self, variant: str | None = None) -> dict[str, Any]:
        """The content of audit.json."""
        return {
            "verdict": self.verdict,
            "variant": variant,
            "seed": self.parameters["seed"],
            "track": self.track,
            "checks": [asdict(check) for check in self.checks],
            "not_run": self.names(NOT_RUN),
            "not_applicable": self.names(NOT_APPLICABLE),
            "parameters": self.parameters,
            "detectable_leak_rate_99": self.detectable_leak_rate_99,
            "meaning_of_pass": self.meaning_of_pass,
        }

    def __str__(self) -> str:
        """A short table of the verdicts for a terminal, one line a check."""
        rows = [(check.verdict, check.name, check.sentence) for check in self.checks]
        rows.append(("", "thoroughness", self.meaning_of_pass))
        rows.append((self.verdict, "overall", self._overall()))
        return "\n".join(f"{verdict:14} {name:14} {sentence}" for verdict, name, sentence in rows)

    def _overall(self) -> str:
        applicable = len(self.checks) - len(self.names(NOT_APPLICABLE))
        parts = [f"{len(self.names(PASS))} of {applicable} applicable checks pass"]
        for verdict in (FAIL, UNDECIDED, NOT_RUN, NOT_APPLICABLE):
            if names := self.names(verdict):
                parts.append(f"{verdict}: {', '.join(names)}")
        return "; ".join([*parts, f"track: {self.track}"])
