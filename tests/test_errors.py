"""The words of errors."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from mode.errors import first_fault


class Inner(BaseModel):
    number: int = 0

    @field_validator("number")
    @classmethod
    def _is_even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("odd")
        return number


class Outer(BaseModel):
    parts: list[Inner]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"parts": [{}, {"number": 3}, {"number": 5}]}, "parts.1.number: odd"),
        ({}, "parts: Field required"),
        (7, "Input should be a valid dictionary or instance of Outer"),
    ],
)
def test_the_first_fault_with_its_place(content: Any, told: str) -> None:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(content)
    assert first_fault(error.value) == told
