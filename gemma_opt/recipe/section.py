"""What every section of a recipe is made of: the frozen model they extend, and the names of roles."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

TEXT_ROLES = ("query", "key", "value", "output", "gate", "up", "down")
TextRole = Literal["query", "key", "value", "output", "gate", "up", "down"]
PrunableRole = TextRole | Literal["vision"]
Ratio = Annotated[float, Field(ge=0.01, le=0.8, allow_inf_nan=False)]
_Role = TypeVar("_Role", bound=str)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    """Dumped with `exclude_none`, it keeps every None that was written where the default is something else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _serialized(self, whole: SerializerFunctionWrapHandler, info: SerializationInfo) -> object:
        return self._tree(whole(self), exclude_none=bool(info.exclude_none))

    def _tree(self, tree: dict[str, object], *, exclude_none: bool) -> object:
        fields = type(self).model_fields.items() if exclude_none else ()
        return tree | {name: None for name, field in fields if getattr(self, name) is None and field.default is not None}


def once(roles: tuple[_Role, ...]) -> tuple[_Role, ...]:
    """The roles, made sure that none is named twice."""
    if len(set(roles)) != len(roles):
        raise ValueError("a role is named twice")
    return roles
