"""The section `evaluation`: its defaults, and adapters that compose as they declare."""

import pytest

from fairway.errors import UserError
from fairway.evaluation.settings import EvaluationSettings
from fairway.plugins import built_in_names
from fairway.settings import validated


def settings(*adapters, **windows):
    return validated(EvaluationSettings, {"adapters": adapters, **windows}, "evaluation")


def test_without_a_key_it_is_the_whole_evaluation_of_the_default_recipe():
    found = EvaluationSettings()
    assert found.labels == ["lora", "slot", "ngram"]
    assert (found.window_tokens, found.stride_tokens) == (2048, 64)
    assert (found.lanes, found.forward_windows) == (32, 32)
    assert found.windows_scored_together is None
    assert [choice.type.title for choice in found.adapters] == ["LoRA", "SLOT", "n-gram cache"]


def test_every_module_beside_the_interface_is_an_adapter():
    assert built_in_names("fairway.evaluation.adapters") == ["lora", "ngram", "slot"]


def test_an_adapter_may_stand_alone_or_several_together():
    assert settings().labels == []
    assert settings("slot", "ngram", "faulty_adapters:FindsItself").labels == [
        "slot", "ngram", "findsitself",
    ]  # fmt: skip
    assert settings({"slot": {"scope": "batch", "batch_windows": 7}}).windows_scored_together == 7


def test_settings_of_an_adapter_are_checked_with_windows_that_are_not_its_own():
    with pytest.raises(UserError, match=r"slot.focal_tokens 64 leaves no context before the"):
        settings({"slot": {"focal_tokens": 64}})
    assert settings({"slot": {"focal_tokens": 64}}, stride_tokens=32)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["ema"], "evaluation.adapters.0: found 'ema', expected one of lora, ngram, slot"),
        (["lorra"], "lora, ngram, slot, or module:Name of your own; did you mean lora?"),
        (["ngram", "slot"], "evaluation.adapters.slot changes logits, so it must come before"),
        (["slot", "lora"], "evaluation.adapters.lora computes logits anew"),
        (["lora", "slot", "lora"], "names lora twice, expected each once: found"),
        ([{"slot": {"scope": "batch"}}, "ngram"], "scores several windows together"),
        ([{"lora": {"rang": 3}}], "evaluation.adapters.lora: unknown key rang; did you mean rank?"),
        (["faulty_adapters:NoAdapter"], "NoAdapter is no subclass of Adapter"),
        ([{"lora": {}, "slot": {}}], "expected a name or {name: {its settings}}"),
    ],
)
def test_what_does_not_compose_is_refused_in_one_line(adapters, message):
    with pytest.raises(UserError) as error:
        settings(*adapters)
    assert message in str(error.value) and "\n" not in str(error.value)
