"""Products that a small model cannot work out, and a tool that can.

Without the tool the reward is about 0; with it, 1.
"""

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping

_OPERATORS: Mapping[type, Callable[[int | float, int | float], int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 100


def calculate(expression: str) -> str:
    """Computes a number.

    Args:
        expression: Numbers with + - * / and brackets, such as 12 * (3 + 4).
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"more than {_LONGEST} characters")
    try:
        tree = ast.parse(expression.replace(",", "").strip(), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, RecursionError):
        raise ValueError(f"cannot read {expression!r}") from None
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if whole else value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("only numbers, + - * / and brackets")


class Calculator:
    """Asks for the product of two numbers. Reward 1 if the policy's last turn ends with
    it, else 0.

    Args:
      digits: of the first and of the second number.
    """

    def __init__(self, digits: tuple[int, int] = (4, 3)):
        if len(digits) != 2 or not all(1 <= count <= 9 for count in digits):
            raise ValueError(f"digits are two numbers from 1 to 9, got {digits}")
        self._digits = tuple(digits)

    def reset(self, seed: int) -> str:
        """The question."""
        draw = random.Random(seed)
        a, b = (draw.randrange(10 ** (n - 1), 10**n) for n in self._digits)
        self._product = a * b
        return f"What is {a} * {b}?"

    def calculate(self, expression: str) -> str:
        """Computes a number.

        Args:
            expression: Numbers with + - * / and brackets, such as 12 * (3 + 4).
        """
        return calculate(expression)

    def get_reward(self, completion: str) -> float:
        """Whether the last number of the policy's last turn is the product."""
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion)
        said = numbers[-1].replace(",", "") if numbers else ""
        return float(said in (f"{self._product}", f"{self._product}.0"))
