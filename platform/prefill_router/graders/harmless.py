"""Decides whether a text is safe to evaluate: reasoning-gym's verifiers call `eval` on answers, which may be programs.

Nothing is evaluated here. The text is parsed, and refused unless every part is known to be harmless and cheap.
"""

from __future__ import annotations

import ast

_TRIGONOMETRIC = "sin cos tan cot sec csc asin acos atan sinh cosh tanh"
_FUNCTIONS = frozenset([*_TRIGONOMETRIC.split(), "exp", "log", "ln", "sqrt", "Abs", "erf"])
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.BitXor)
_MAX_CHARS = 2000
_MAX_EXPONENT = 99
_MAX_NESTED_POWERS = 2


def is_harmless(text: str, language: str) -> bool:
    """Whether `text` is a Python literal or name, for "python", or a formula, for "sympy".

    Text that Python cannot parse is harmless as "python". It is refused as "sympy", which repairs some of it first.
    """
    if len(text) > _MAX_CHARS:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return language == "python"
    except (MemoryError, RecursionError):
        return False
    return _is_literal(tree) or isinstance(tree, ast.Name) if language == "python" else _is_formula(tree)


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.List | ast.Tuple):
        return all(map(_is_literal, node.elts))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub | ast.UAdd) and _is_literal(node.operand)
    return isinstance(node, ast.Constant)


def _is_formula(node: ast.expr) -> bool:
    return _powers(node) <= _MAX_NESTED_POWERS


def _powers(node: ast.expr) -> float:
    """The nesting depth of powers; infinite if the node is no formula or an exponent is too large."""
    if isinstance(node, ast.Constant):
        return 0 if isinstance(node.value, int | float) and not isinstance(node.value, bool) else float("inf")
    if isinstance(node, ast.Name):
        return float("inf") if node.id.startswith("__") else 0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _powers(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return float("inf") if node.keywords else max(map(_powers, node.args), default=0)
    if isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        deepest = max(_powers(node.left), _powers(node.right))
        return deepest + _is_large(node.right) if isinstance(node.op, ast.Pow) else deepest
    return float("inf")


def _is_large(exponent: ast.expr) -> float:
    """What a power adds to the depth: 1 for an exponent of small numbers or with symbols, else infinity."""
    numbers = [node.value for node in ast.walk(exponent) if isinstance(node, ast.Constant)]
    has_power = any(isinstance(node, ast.Pow | ast.Mult) for node in ast.walk(exponent))
    symbolic = any(isinstance(node, ast.Name) and node.id not in _FUNCTIONS for node in ast.walk(exponent))
    small = all(isinstance(n, int | float) and abs(n) <= _MAX_EXPONENT for n in numbers)
    return 1 if small and (symbolic or not has_power) else float("inf")
