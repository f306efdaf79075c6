"""Known slips of public files: understood, with a warning that says what was meant."""

from __future__ import annotations

from typing import Any


def mend(raw: dict[str, Any], where: str) -> list[str]:
    """Put misplaced keys of one file where they were meant to be, in place; return the warnings."""
    warnings: list[str] = []
    _move(raw, ("model", "save_path"), ("global", "save_path"), where, warnings)
    stages = raw.get("compression")
    if isinstance(stages, dict):
        _move(raw, ("calibrate",), ("compression", "calibrate"), where, warnings)
    for stage in stages if isinstance(stages, list) else [stages]:
        if isinstance(stage, dict):
            _mend_stage(stage, where, warnings)
    return warnings


def _mend_stage(stage: dict[str, Any], where: str, warnings: list[str]) -> None:
    if "quantization" in stage:
        _move(
            stage,
            ("quant_analyse",),
            ("quantization", "quant_analyse"),
            where,
            warnings,
            prefix="compression.",
        )
    sparsity = stage.get("sparsity")
    if isinstance(sparsity, dict) and "attn_kwargs" in sparsity and sparsity["attn_kwargs"] is None:
        warnings.append(f"{where}: compression.sparsity.attn_kwargs is null; the method's defaults are used.")
    if stage.get("name") == "FP8BlockWise":
        stage["name"] = "PTQWeightOnly"
        warnings.append(f"{where}: compression.name FP8BlockWise is an old name of PTQWeightOnly.")


def _move(
    root: dict[str, Any],
    source: tuple[str, ...],
    target: tuple[str, str],
    where: str,
    warnings: list[str],
    prefix: str = "",
) -> None:
    """Move a key to the section where it belongs; a value already there wins."""
    holder = root.get(source[0]) if len(source) == 2 else root
    if not isinstance(holder, dict) or source[-1] not in holder:
        return
    section = root.get(target[0])
    if section is not None and not isinstance(section, dict):
        return  # a wrong type, reported with all others
    value = holder.pop(source[-1])
    was, meant = prefix + ".".join(source), prefix + ".".join(target)
    if section is not None and section.get(target[1]) is not None:
        warnings.append(f"{where}: {was} is misplaced and was ignored; {meant} is given as well.")
        return
    if section is None:
        section = root[target[0]] = {}
    section[target[1]] = value
    warnings.append(f"{where}: {was} was read as {meant}.")
