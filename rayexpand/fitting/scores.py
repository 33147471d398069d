"""Scores of the seeds of a dataset (studies/cross_fit.py), as an artifact and in a loop.

    fit:
      scores: {folds: 5, recipe: {preset: ...}}
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.settings import Section


class Scoring(Section):
    """How seeds are scored."""

    folds: int = Field(5, ge=1, le=1000, description="a seed is scored by the classifier that was trained without its "
                       "fold; 1: by one that was trained on everything, in sample")
    recipe: dict[str, Any] = Field({}, description="preset and fields of the training recipe, docs/studies.md")
    group: str | None = Field(None, min_length=1, description="keeps seeds together in a fold, such as frames of one "
                              "video: a text column of data.path (parquet, manifest), or a .csv file with seed_id and "
                              "group; null: ids of one image alone")

    @field_validator("recipe")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        make_recipe(recipe)
        return recipe
