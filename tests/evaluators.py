"""Settings of evaluators out of flat changes: every key belongs to one section only."""

from dataclasses import fields, replace
from typing import Any

from fairway.adaptation.lora import LoraSettings
from fairway.adaptation.scoring import EvaluatorSettings
from fairway.adaptation.slot import SlotSettings
from fairway.adaptation.stream import EvaluationSettings

SMALL = EvaluatorSettings(
    evaluation=EvaluationSettings(
        adapters=("slot",),
        window_tokens=32,
        stride_tokens=6,
        lanes=5,
        forward_windows=2,
    ),
    slot=SlotSettings(
        scope="window",
        batch_windows=4,
        focal_tokens="all",
        l2=3.0,
        clamp=5.0,
        iterations=25,
        history=10,
        same_document=True,
        context_logits="current",
    ),
    lora=LoraSettings(
        rank=2,
        projections=("query", "value"),
        scales=False,
        learning_rate=0.05,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        gradient_clip=1.0,
        steps=1,
        chunk_tokens=6,
        context_tokens=24,
    ),
)


def changed(settings: EvaluatorSettings, **changes: Any) -> EvaluatorSettings:
    """`settings` with keys of any of their sections changed."""
    sections = {}
    for section in fields(settings):
        before = getattr(settings, section.name)
        own = {key.name for key in fields(before)} & set(changes)
        sections[section.name] = replace(before, **{key: changes.pop(key) for key in own})
    assert not changes, f"no section has {', '.join(changes)}"
    return EvaluatorSettings(**sections)


def focal_places(settings: EvaluatorSettings) -> int:
    """The window's last positions that a delta may be fitted to."""
    focal = settings.slot.focal_tokens
    return settings.evaluation.window_tokens if focal == "all" else int(focal)
