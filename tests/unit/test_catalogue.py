"""The table of model_types: each row can be loaded, and each family and each row of the parity grid has one."""

import re
from pathlib import Path

import pytest

import streamllm.weights
from streamllm.weights import FAMILIES, MODEL_TYPES
from streamllm.weights.family import Family
from tests.parity.grid import VARIANTS


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_family_of_each_row_is_loaded(model_type: str) -> None:
    assert isinstance(FAMILIES[model_type], Family)
    new_name = MODEL_TYPES[model_type].replaced_by
    assert new_name is None or FAMILIES[new_name] is FAMILIES[model_type]


def test_mapping_has_the_keys_of_the_table() -> None:
    assert list(FAMILIES) == list(MODEL_TYPES)
    assert len(FAMILIES) == len(MODEL_TYPES)
    assert "gptj" not in FAMILIES
    with pytest.raises(KeyError):
        FAMILIES["gptj"]


def test_each_family_has_a_row() -> None:
    folder = Path(streamllm.weights.__path__[0])
    modules = {path.stem for path in folder.glob("*.py") if " = Family(" in path.read_text(encoding="utf-8")}
    assert modules == {row.module for row in MODEL_TYPES.values()}


def test_each_row_is_in_the_parity_grid() -> None:
    compared = {(variant.config | variant.disguise)["model_type"] for variant in VARIANTS}
    assert compared == set(MODEL_TYPES)


def test_each_example_is_a_name_on_the_hub() -> None:
    rows = [row for row in MODEL_TYPES.values() if row.replaced_by is None]
    assert all(row.variants for row in rows)
    examples = [example for row in rows for variant in row.variants for example in variant.examples]
    assert len(set(examples)) == len(examples)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", example) for example in examples)
