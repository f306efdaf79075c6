from __future__ import annotations

import pytest

from angelslim.base.errors import ConfigError
from angelslim.evaluate import speed
from angelslim.evaluate.inference import read_so_far
from angelslim.evaluate.speed import Timing, generation_speed


def test_figures_follow_from_the_median_round(model, monkeypatch):
    rounds = iter([Timing(9.0, 9.0), Timing(0.5, 2.0), Timing(0.1, 1.0), Timing(0.25, 4.0)])
    monkeypatch.setattr(speed, "time_generation", lambda *_: next(rounds))
    scores = {
        score.metric: score for score in generation_speed(model, batch_size=2, prompt_tokens=10, new_tokens=5)
    }
    assert scores["ttft"].value == 250 and scores["ttft"].better == "lower"
    assert scores["tpot"].value == 500
    assert scores["prefill"].value == 80
    assert scores["decode"].value == 4
    assert {score.samples for score in scores.values()} == {3}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_what_was_read_is_handed_on_by_the_name_it_came_with(name):
    assert read_so_far({"logits": 1, name: 2}) == {name: 2}


def test_the_timed_loop_runs_the_model_as_it_says(model):
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores = generation_speed(model, batch_size=2, prompt_tokens=9, new_tokens=4, warmup=0, repeats=1)
    handle.remove()
    assert widths == [(2, 9)] + [(2, 1)] * 3
    assert all(score.value > 0 for score in scores)


@pytest.mark.parametrize(
    "wrong", [{"new_tokens": 1}, {"repeats": 0}, {"prompt_tokens": 0}, {"batch_size": 0}]
)
def test_senseless_settings_are_refused(model, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generation_speed(model, **wrong)
