"""The referee: audits any evaluator, and knows it only as a function.

from fairway.audit import AuditSettings, Recorder, Scores, audit
"""

from importlib import import_module
from typing import Any

EXPORTED = {
    "AuditSettings": "runner",
    "Recorder": "recorder",
    "Scores": "interface",
    "audit": "runner",
}
"""Name → module. Looked up when asked for: a stage that reads one module depends on no other."""


def __getattr__(name: str) -> Any:
    if name not in EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTED[name]}"), name)
