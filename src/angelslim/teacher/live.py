"""Teachers that run beside the student, in every step.

Another model
    `open_teacher`: any model folder with the student's tokenizer, larger or smaller, full-precision or compressed.
The frozen original
    `frozen_copy` of the student, made before quantizers are attached: a second set of weights in memory.
The student's own full-precision weights
    `own_masters`: the student runs a second time with its fake quantization off. No second set of weights; the teacher
    stays what it was only as long as the weights themselves are not trained (scales alone are), otherwise it drifts along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import ConfigError
from ..export._checkpoint import open_any
from ..numerics.distillation import TopLogits
from .vocabulary import require_same, vocabulary_of

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about a batch; `words` is how many of the logits belong to tokens, None for all."""

    logits: Tensor | TopLogits
    states: tuple[Tensor, ...] = ()  # after the embedding and after each block, if asked for
    words: int | None = None


class Teacher(Protocol):
    """Anything that gives a lesson on a batch with ``input_ids``."""

    def __call__(self, batch: Batch, states: bool = False) -> Lesson:
        """Return the lesson, with hidden states if `states`."""
        ...


class ModelTeacher:
    """A model in evaluation mode, without gradients; `switch` is entered around each of its runs."""

    def __init__(
        self,
        model: nn.Module,
        switch: Callable[[], AbstractContextManager[Any]] = nullcontext,
        words: int | None = None,
    ) -> None:
        self.model, self.switch, self.words = model, switch, words

    def __call__(self, batch: Batch, states: bool = False) -> Lesson:
        """Run the model; its training flags are afterwards what they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), self.switch():
                found = self.model(
                    input_ids=batch["input_ids"],
                    use_cache=False,
                    **({"output_hidden_states": True} if states else {}),
                )
        finally:
            for module, training in modes:
                module.training = training
        return Lesson(found.logits, tuple(found.hidden_states or ()) if states else (), self.words)


def open_teacher(
    reference: str | Path,
    student_tokenizer: Any,
    *,
    student_name: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> ModelTeacher:
    """Open a model folder as a teacher; `dtype` is that of its weights, by default the folder's own.

    A tokenizer that differs from the student's is a `ConfigError`, before any weight is read.
    """
    from transformers import AutoTokenizer

    source = open_any(reference, trust_remote_code=trust_remote_code)
    if not any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(
            f"The teacher {reference} has no tokenizer to compare with the student's.",
            where=str(source.folder),
            fix="Copy its tokenizer files into the folder.",
        )
    tokenizer = AutoTokenizer.from_pretrained(
        source.folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    own = vocabulary_of(student_tokenizer, student_name or str(student_tokenizer.name_or_path))
    require_same(vocabulary_of(tokenizer, str(reference)), own)
    model = source.materialize("", torch.device(device))
    model.tie_weights()  # type: ignore[operator]
    return ModelTeacher(model.to(dtype).requires_grad_(False), words=own.size)


def frozen_copy(model: nn.Module) -> ModelTeacher:
    """Copy a model as it is now; call it before the student changes."""
    return ModelTeacher(copy.deepcopy(model).requires_grad_(False))


def own_masters(model: nn.Module, unquantized: Callable[[], AbstractContextManager[Any]]) -> ModelTeacher:
    """Let the student teach itself: `unquantized` gives a context in which its fake quantization is off."""
    return ModelTeacher(model, unquantized)
