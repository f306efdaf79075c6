"""The hidden state of every calibration sample between two blocks: in memory, on disk past a budget.

Each *generation* is the input of one block. While block k runs, generation k is read and generation k + 1 is
written; `commit` puts the new generation on disk, so that a killed run continues with block k + 1, and forgets
the old one. Tensors are ``[1, tokens, hidden]``, one sample each, of different lengths.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class ActivationStore:
    """Samples' hidden states, `budget` bytes of which stay in memory."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._memory: dict[tuple[int, int], Tensor] = {}
        self._resident = 0

    def _file(self, generation: int, sample: int) -> Path:
        return self.folder / f"{generation:04d}" / f"{sample:06d}.safetensors"

    def put(self, generation: int, sample: int, hidden: Tensor) -> None:
        """Keep one sample's hidden state."""
        hidden = hidden.detach().to("cpu").contiguous()
        self.drop(generation, sample)
        if self._resident + hidden.nbytes <= self.budget:
            self._memory[generation, sample] = hidden
            self._resident += hidden.nbytes
        else:
            self._write(generation, sample, hidden)

    def get(self, generation: int, sample: int) -> Tensor:
        """Return one sample's hidden state, from memory or disk."""
        resident = self._memory.get((generation, sample))
        return load_file(self._file(generation, sample))["hidden"] if resident is None else resident

    def copy(self, other: ActivationStore, generation: int, samples: int) -> None:
        """Take over another store's generation."""
        for sample in range(samples):
            self.put(generation, sample, other.get(generation, sample))

    def drop(self, generation: int, sample: int) -> None:
        """Release the memory of one sample; a copy on disk stays until the next commit."""
        resident = self._memory.pop((generation, sample), None)
        if resident is not None:
            self._resident -= resident.nbytes

    def commit(self, generation: int) -> None:
        """Put a whole generation on disk."""
        for (number, sample), hidden in self._memory.items():
            if number == generation:
                self._write(number, sample, hidden)

    def forget(self, generation: int) -> None:
        """Delete a generation that no resumed run can need any more."""
        for number, sample in list(self._memory):
            if number == generation:
                self.drop(number, sample)
        shutil.rmtree(self.folder / f"{generation:04d}", ignore_errors=True)

    def complete(self, generation: int, samples: int) -> bool:
        """Say whether every sample of a generation can be read."""
        return all(
            (generation, sample) in self._memory or self._file(generation, sample).exists()
            for sample in range(samples)
        )

    def _write(self, generation: int, sample: int, hidden: Tensor) -> None:
        file = self._file(generation, sample)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_file({"hidden": hidden}, temporary)
        temporary.replace(file)
