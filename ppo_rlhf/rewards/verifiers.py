"""Rewards that need no model: each response is right, 1, or not, 0.

All are reward functions once their settings are bound: `arguments` of a part in the configuration, or
`functools.partial` in Python.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ppo_rlhf.errors import UserError, did_you_mean

# A sign after a digit or a bracket is an operator; an exponent of more than two digits would be more than a number.
NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}\b)?")
LONGEST_NUMBER = 1000  # characters
OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def exact_match(
    prompts: list[str], responses: list[str], *, column: str = "answer", ignore_case: bool = False, **columns: list[Any]
) -> list[float]:
    """1 where the response is the text in the prompt's `column`, white space around it aside."""

    def plain(text: Any) -> str:
        return str(text).strip().casefold() if ignore_case else str(text).strip()

    expected = expected_in(column, columns)
    return [float(plain(response) == plain(text)) for response, text in zip(responses, expected, strict=True)]


def regular_expression(prompts: list[str], responses: list[str], *, pattern: str, **columns: list[Any]) -> list[float]:
    r"""1 where the pattern, in Python's syntax, is found in the response; `\A…\Z` asks for the whole of it."""
    found = re.compile(pattern)
    return [float(found.search(response) is not None) for response in responses]


def arithmetic(
    prompts: list[str], responses: list[str], *, column: str = "answer", **columns: list[Any]
) -> list[float]:
    """1 where the last number in the response is the value in the prompt's `column`: exactly, 0.50 is 1/2.

    The column holds a number, an arithmetic expression of + − * / and brackets, or a text whose last number counts, as
    "… #### 72" in GSM8K (Cobbe et al., 2021).
    """
    expected = [value_of(str(text)) for text in expected_in(column, columns)]
    for text, value in zip(columns[column], expected, strict=True):
        if value is None:
            raise UserError(f"arithmetic: there is no number in {text!r}, column {column!r}.")
    return [float(last_number(response) == value) for response, value in zip(responses, expected, strict=True)]


def json_schema(
    prompts: list[str],
    responses: list[str],
    *,
    schema: dict[str, Any] | None = None,
    column: str | None = None,
    **columns: list[Any],
) -> list[float]:
    """1 where the response is one JSON document that fits the schema, or the one in the prompt's `column`.

    By the package `jsonschema`, the extra `json`.
    """
    if (schema is None) == (column is None):
        raise UserError("json_schema: give either schema, or the column that holds each prompt's.")
    schemas = [schema] * len(responses) if column is None else expected_in(column, columns)
    return [float(_fits(response, each)) for response, each in zip(responses, schemas, strict=True)]


def expected_in(column: str, columns: dict[str, list[Any]]) -> list[Any]:
    """The prompts' column. Raises UserError where there is none of this name."""
    if column not in columns:
        found = ", ".join(sorted(columns)) or "none"
        raise UserError(f"the prompts have no column {column!r}, only: {found}.{did_you_mean(column, columns)}")
    return columns[column]


def last_number(text: str) -> Fraction | None:
    """The last number in a text, such as −1,234.5 or 3e2; None where there is none."""
    numbers = NUMBER.findall(text.replace("−", "-"))
    return Fraction(numbers[-1].replace(",", "")) if numbers and len(numbers[-1]) <= LONGEST_NUMBER else None


def value_of(text: str) -> Fraction | None:
    """The value of an arithmetic expression; of any other text that of its last number."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return last_number(text)


def _value(node: ast.expr) -> Fraction:
    """Exactly, and without calling anything that a text might name. Raises ValueError for what is no arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(ast.dump(node))


def _fits(response: str, schema: Any) -> bool:
    try:
        import jsonschema
    except ModuleNotFoundError as error:
        raise UserError("json_schema needs a package that is not installed: install 'ppo-rlhf[json]'.") from error
    try:
        jsonschema.validate(json.loads(response), json.loads(schema) if isinstance(schema, str) else schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    except jsonschema.SchemaError as error:
        raise UserError(f"json_schema: the schema is wrong: {error.message}") from error
    return True
