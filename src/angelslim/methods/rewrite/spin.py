"""Rotations that are fused into the weights (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

A few channels of a large model's activations are hundreds of times the others, and a scale that has to reach them leaves
few codes for the rest. An orthogonal matrix Q mixes the channels, so that the largest value of a token comes down to a few
times its average, and it costs nothing at run time where it can be absorbed by weights on both sides:

* **R1** rotates the residual stream. RMSNorm commutes with Q once its gain g is folded into the linears that read it,
  because ``|x Q| = |x|``. Embedding ``E -> E Q``; what writes into the stream ``W -> Q' W, b -> Q' b``; what reads it
  through a norm ``W -> W diag(g) Q``, the head included, and gains become 1. A head that is tied to the embedding becomes
  a tensor of its own, since only one of the two has the last norm's gain.
* **R2** rotates the values of each head: rows of v_proj, and the columns of o_proj that read them, by one matrix of
  ``head_dim`` channels a block. Attention sums values over tokens, which commutes. Queries that share a head of values
  share its rotation.

R3 (queries and keys, for a quantized cache) and R4 (the input of down_proj) stand behind a nonlinearity, so the engine
would have to compute them at every token. Engines that read ordinary checkpoints do not: both are left out.

Q is a Hadamard matrix by default (`numerics.hadamard`). It is not learned: SpinQuant's training of Q is not done here. In
full precision the model's function stays the same, which is verified on its own weights before anything is compressed; in
16 bits the rotated weights are rounded once more. Everything happens while tensors are read, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ...base.console import chose, log
from ...base.errors import ConfigError, ModelError
from ...models.loading import Source, open_with
from ...numerics.hadamard import Kind, Rotation, hadamard, rotation
from ._fuse import Changes
from ._residual import UNFIT, Trace, Values, residual, values
from ._verify import ROOM, difference, in_float32
from ._view import RewrittenCheckpoint

FUSED, ONLINE = ("R1", "R2"), ("R3", "R4")
KINDS: dict[str, Kind | None] = {
    "Hadamard": "hadamard",
    "Random": "random_hadamard",
    "Orthogonal": "orthogonal",
    "Identity": None,
}


class Spin:
    """Rotates a checkpoint as it is read."""

    reads = frozenset({"rotation", "rotation_mode", "had_dim", "seed", "ignore_layers", "output_log"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        wanted = [str(name).upper() for name in options.get("rotation", FUSED)]
        unknown = [name for name in wanted if name not in (*FUSED, *ONLINE)]
        if unknown:
            raise ConfigError(f"There is no rotation {unknown[0]!r}.", fix="Choose from R1 and R2.")
        if not set(wanted) & set(FUSED):
            raise ConfigError(
                f"transform.spin_config.rotation asks for {', '.join(wanted) or 'nothing'} only, which no engine that "
                "loads an ordinary checkpoint computes.",
                fix="Choose R1, R2, or both: they are fused into the weights.",
            )
        if options.get("ignore_layers"):
            raise ConfigError(
                "A fused rotation cannot leave layers out: all that share the rotated channels must follow.",
                fix="Empty transform.spin_config.ignore_layers; what is not quantized belongs to quantization.ignore_layers.",
            )
        self.rotations = frozenset(wanted)
        mode = str(options.get("rotation_mode", "Hadamard"))
        if mode not in KINDS:
            raise ConfigError(f"There is no rotation_mode {mode!r}.", fix=f"Choose from {', '.join(KINDS)}.")
        self.kind = KINDS[mode]
        self.size, self.seed = int(options.get("had_dim", -1)), int(options.get("seed", 0))

    def rewrite(self, source: Source) -> Source:
        """Return the rotated source; a model whose function would change is a `ModelError`."""
        trace = Trace.of(source)
        changes = Changes(source)
        stream = None
        if "R1" in self.rotations:
            stream = self._rotation("R1", self._width(source), self.seed)
            changes.stream(residual(source, trace), stream)
        if "R2" in self.rotations:
            for index, made in enumerate(_values(trace)):
                turn = self._rotation("R2", made.width, self.seed + 1 + index)
                if turn is not None:
                    changes.values(made, turn)
        _refuse_difference(source, changes, stream)
        _warn_of_strangers(source)
        config, edits = source.config, dict(source.edits)
        if "R1" in self.rotations and getattr(config, "tie_word_embeddings", False):
            config = deepcopy(config)
            config.tie_word_embeddings = edits["tie_word_embeddings"] = False
        view = RewrittenCheckpoint(source.checkpoint, changes.edits, changes.added.values())
        rewritten = open_with(source.name, source.folder, config, view)
        rewritten.edits, rewritten.structure = edits, source.structure
        rewritten.check()
        return rewritten

    def _width(self, source: Source) -> int:
        """Return how many channels of the residual stream R1 mixes."""
        width = int(source.model.get_input_embeddings().weight.shape[1])
        if self.size > 0 and width % self.size:
            raise ConfigError(
                f"had_dim {self.size} does not divide the {width} channels of the residual stream.",
                fix=f"Choose a divisor of {width}, or -1 for all of them.",
            )
        return self.size if self.size > 0 else width

    def _rotation(self, name: str, size: int, seed: int) -> Rotation | None:
        if self.kind is None:
            return None
        found = rotation(size, self.kind, seed)
        core = len(found.factors[0])
        if self.kind != "orthogonal" and hadamard(core) is None:
            chose(f"{name} mixes groups of {core} at random", f"no Hadamard matrix of {size} is known here")
        return found


def _values(trace: Trace) -> list[Values]:
    """Return how each attention module's values are made; refuse a model where nobody can say."""
    found = values(trace)
    reasons = [each for each in found.values() if isinstance(each, str)]
    if reasons or not found:
        raise ModelError(
            f"R2 cannot rotate the values of this model: {reasons[0] if reasons else 'its attention is not seen'}.",
            fix="Set transform.spin_config.rotation to [R1].",
        )
    return [each for each in found.values() if isinstance(each, Values)]


def _refuse_difference(source: Source, changes: Changes, stream: Rotation | None) -> None:
    """Refuse a model that computes something else when it is rotated."""
    try:
        apart, where = difference(in_float32(source), changes.edits, stream)
    except UNFIT as error:
        raise ModelError(
            f"The rotated {source.structure.model_type} could not be compared with the original ({error}).",
            fix="Leave out the transform; please report the architecture.",
        ) from error
    if not apart <= ROOM:  # NaN is refused too
        raise ModelError(
            f"Rotating this model changes what {where} computes, by {apart:.1e} of its largest output.",
            fix="Leave out the transform, or try R1 and R2 by themselves.",
        )


def _warn_of_strangers(source: Source) -> None:
    """Say which matrices stay as they are because transformers builds no module for them."""
    names = [
        name
        for name, info in source.checkpoint.tensors.items()
        if name not in source.targets and len(info.shape) > 1
    ]
    if names:
        log.warning(
            "%s and %d more are carried over as they are: whatever reads the rotated hidden states with them (a head "
            "that predicts several tokens, say) will draft badly.",
            names[0],
            len(names) - 1,
        )


METHOD = Spin
