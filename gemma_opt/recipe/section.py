"""What every section of a recipe is made of: the frozen model they extend, and the names of roles."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

TEXT_ROLES = ("query", "key", "value", "output", "gate", "up", "down")
TextRole = Literal["query", "key", "value", "output", "gate", "up", "down"]
PrunableRole = TextRole | Literal["vision"]
Ratio = Annotated[float, Field(ge=0.01, le=0.8, allow_inf_nan=False)]
_Role = TypeVar("_Role", bound=str)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def once(roles: tuple[_Role, ...]) -> tuple[_Role, ...]:
    if len(set(roles)) != len(roles):
        raise ValueError("a role is named twice")
    return roles
