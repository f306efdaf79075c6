"""Public keys become the selectors' own options; places and densities are checked; public files load unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from angelslim.base.errors import ConfigError
from angelslim.config.recipe import load
from angelslim.config.sparsity import KNOWN_PATTERNS, SparseRule, block_of, numbers, rules_of
from angelslim.methods.sparse.metadata import HeadRule
from angelslim.methods.sparse.selectors.base import SELECTORS
from public_sparsity import PUBLIC


def section(**values: Any) -> Any:
    resolved = load({"compression": {"name": "Sparsity", "sparsity": values}})
    return resolved.config.compression[0].sparsity, resolved.warnings


@pytest.mark.parametrize("name", PUBLIC)
def test_public_keys_are_the_selectors_options(name: str) -> None:
    knobs, options = PUBLIC[name]
    found, warnings = section(name=name, allow_pseudo_sparse=True, attn_kwargs=knobs)
    (rule,) = rules_of(found)
    assert rule.selector == ("xattention" if name == "cosa" else name)
    assert dict(rule.options) == options
    assert HeadRule(rule.selector, rule.options).make().selector is not None, "the selector takes them"
    assert block_of(found) == 128
    assert warnings == [] if name != "cosa" else "cosa runs as xattention" in warnings[0]


def test_every_selector_has_a_public_name() -> None:
    assert set(SELECTORS) | {"cosa"} == set(KNOWN_PATTERNS)


def test_rules_options_and_density() -> None:
    found, warnings = section(
        name="stem",
        density=0.1,
        block=64,
        options={"lambda": 0.3},
        attn_kwargs={"stride": 16},
        rules=[
            {"name": "dense", "layers": "0-1"},
            {"name": "a_shape", "layers": 3, "heads": [0, 2], "density": 0.2},
        ],
    )
    assert rules_of(found) == (
        SparseRule("dense", {}, "0-1"),
        SparseRule("a_shape", {"density": 0.2}, "3", "0,2"),
        SparseRule("stem", {"stride": 16, "lambda": 0.3, "density": 0.1}),
    )
    assert block_of(found) == 64 and warnings == []


@pytest.mark.parametrize(
    ("places", "expected"),
    [(None, None), ("3", (3,)), ("0-2, 5", (0, 1, 2, 5)), ("6-", (6, 7)), ("1,1", (1,))],
)
def test_numbers_and_ranges(places: str | None, expected: tuple[int, ...] | None) -> None:
    assert numbers(places, 8, "layer") == expected


def test_a_density_that_is_given_twice_is_refused() -> None:
    """A recipe's own density would win over the options, and nobody would know."""
    found, _ = section(name="union", density=0.1, options={"density": 0.2})
    with pytest.raises(ConfigError, match=r"given twice: density 0.1, options.density 0.2"):
        rules_of(found)
    assert rules_of(section(name="union", options={"density": 0.2})[0])[0].options == {"density": 0.2}


@pytest.mark.parametrize(
    ("places", "words"),
    [("9", "model has 8, from 0 to 7"), ("4-2", "model has 8"), ("a", "layer 'a'"), ("-3", "layer '-3'")],
)
def test_wrong_places(places: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        numbers(places, 8, "layer")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "stem", "density": 0}, "density is 0: a density is a share"),
        ({"name": "stem", "density": 1.2}, "a density is a share"),
        ({"name": "stem", "density": [0.1, [0.2, 7]]}, "a density is a share"),
        ({"name": "stemm"}, "Did you mean 'stem'"),
        ({"name": "stem", "rules": [{"name": "a_shap"}]}, "Did you mean 'a_shape'"),
        ({"name": "stem", "crossover": "soon"}, "crossover is 'soon': a whole number is needed, or auto"),
        ({"name": "stem", "attn_kwargs": {"stirde": 8}}, "stride"),
        ({"name": "stem", "measure": {"length": [4]}}, "lengths"),
    ],
)
def test_wrong_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        section(**values)


def test_keys_without_effect_are_said() -> None:
    assert section(name="a_shape", attn_kwargs={"gamma": 0.9})[1] == [
        "sparsity.attn_kwargs.gamma has no effect on a_shape."
    ]
    assert "only minference" in section(name="stem", search_heads=True)[1][0]
