"""Statistics of a block's inputs: one run for all of them, true after a rescaling, collected again after a change."""

from __future__ import annotations

import torch

from angelslim.models.inputs import Inputs


class Sum:
    """The sum of the inputs, which follows a rescaling."""

    def __init__(self) -> None:
        self.total = torch.zeros(2)
        self.merged = 0

    def update(self, inputs):
        self.total = self.total + inputs.sum(0)

    def merge(self):
        self.merged += 1

    def rescale(self, columns):
        self.total = self.total / columns
        return True


class Largest(Sum):
    """The largest input of all channels, which does not."""

    def update(self, inputs):
        self.total = inputs.amax().reshape(1)

    def rescale(self, columns):
        return False


class Runs:
    """Shows the same inputs to whoever watches, and counts."""

    def __init__(self) -> None:
        self.watched = []

    def __call__(self, observe):
        self.watched.append(sorted(observe))
        for function in observe.values():
            for _ in range(3):
                function(torch.tensor([[2.0, 8.0]]))


def expecting() -> Inputs:
    inputs = Inputs()
    inputs.expect({("a", Sum): Sum, ("b", Sum): Sum})
    inputs.expect({("a", Sum): Sum, ("a", Largest): Largest})
    return inputs


def test_the_first_who_asks_has_all_collected_in_one_run():
    inputs, run = expecting(), Runs()
    found = inputs.find(Sum, "a", run)
    assert found.total.tolist() == [6, 24] and found.merged == 1
    assert inputs.find(Largest, "a", run).total.tolist() == [8]
    assert inputs.find(Sum, "b", run).merged == 1
    assert inputs.find(Sum, "a", run) is found and run.watched == [["a", "b"]]


def test_after_a_rescaling_what_can_follow_does_and_the_rest_is_collected_again():
    inputs, run = expecting(), Runs()
    inputs.find(Sum, "a", run)
    inputs.rescaled(["a"], torch.tensor([2.0, 4.0]))
    assert inputs.find(Sum, "a", run).total.tolist() == [3, 6]
    assert inputs.find(Sum, "b", run).total.tolist() == [6, 24] and len(run.watched) == 1
    assert inputs.find(Largest, "a", run).merged == 1 and run.watched[1] == ["a"]


def test_after_any_other_change_all_are_collected_again_but_what_nobody_wants():
    inputs, run = expecting(), Runs()
    first = inputs.find(Sum, "a", run)
    inputs.drop(Largest, "a")
    inputs.forget()
    assert inputs.find(Sum, "b", run).total.tolist() == [6, 24]
    assert inputs.find(Sum, "a", run) is not first and run.watched == [["a", "b"], ["a", "b"]]
