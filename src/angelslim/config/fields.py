"""The ground that every section of a configuration stands on: lenient values, strict keys.

A *value* may come as YAML writers leave it: ``"1e-4"`` for a number, ``null`` for "leave it at its default",
``8`` where a name is expected. A *key* may not be unknown. `Section` refuses unknown keys, and
`keys.unknown_keys` finds all of them before pydantic looks at the values, so that each comes with the nearest
known key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


class Section(BaseModel):
    """A mapping of the file. Unknown keys are refused; a key whose value is null counts as not given."""

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,  # `global_` beside its alias `global`, a Python keyword
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # the dialect has keys such as model_path
        defer_build=True,  # 40 sections, of which a run uses few
    )
    extra_keys: ClassVar[frozenset[str]] = frozenset()  # keys that hold free values

    @classmethod
    def extra_section(cls, key: str) -> type[Section] | None:
        """The section that an open key such as a layer index holds, or None when the key is unknown."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data

    def given(self) -> dict[str, object]:
        """The keys that were set (in the file, the recipe or an override), nested sections as mappings."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def parse_size(value: object) -> int:
    """Read a size in bytes: a number, or ``5GB`` (10^9), ``512MiB`` (2^20).

    >>> parse_size("5GB"), parse_size("1.5KiB"), parse_size(1024)
    (5000000000, 1536, 1024)
    """
    match = _SIZE.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError("a size such as 5GB, 512MiB or a number of bytes is needed")
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if size <= 0:
        raise ValueError("a size above zero is needed")
    return size


def not_a_truth_value(value: object) -> object:
    """Refuse true and false where a number is meant; Python takes them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _word(value: object) -> object:
    # YAML 1.1 reads a bare no/off as false, and the dialect has words such as save_strategy: no.
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _listed(value: object) -> object:
    if isinstance(value, list):
        return [item for item in value if item is not None]
    return [value]


def _hyphens(value: object) -> object:
    return value.replace("_", "-") if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(not_a_truth_value)]
Count = Annotated[int, Field(ge=1), BeforeValidator(not_a_truth_value)]
Number = Annotated[float, BeforeValidator(not_a_truth_value)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(not_a_truth_value)]
Amount = Annotated[float, Field(ge=0), BeforeValidator(not_a_truth_value)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(not_a_truth_value)]
Size = Annotated[int, BeforeValidator(parse_size)]
Word = Annotated[str, BeforeValidator(_word)]
Words = Annotated[list[str], BeforeValidator(_listed)]
Ints = Annotated[list[Int], BeforeValidator(_listed)]

Grain = Literal["per-tensor", "per-channel", "per-token", "per-group", "per-block", "per-head"]
GrainName = Annotated[Grain, BeforeValidator(_hyphens)]  # both spellings occur: per-group and per_group
