"""Judges code that was asked for as a function of the Fibonacci numbers: its name, its start (0 or 1), whether it gives
the n-th number, the first n or all below n were left open, so each counts. `names`: the code's globals."""

import inspect
import itertools

NUMBERS = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]


def plausible(value):
    if inspect.isgenerator(value):
        value = list(itertools.islice(value, 10))
    if isinstance(value, (list, tuple)):
        values = list(value)
        return len(values) >= 6 and any(values == NUMBERS[i : i + len(values)] for i in (0, 1, 2))
    return type(value) is int and value in (34, 55, 89)


def right(function):
    """f(10), and f(7) to tell a formula from a constant."""
    ten, seven = function(10), function(7)
    if not plausible(ten):
        return False
    if type(ten) is int:
        return seven == NUMBERS[NUMBERS.index(ten) - 3]
    return True


def judge(names):
    made = [f for f in names.values() if inspect.isfunction(f) and f.__module__ == "answer"]
    for function in sorted(made, key=lambda f: "fib" not in f.__name__.lower()):
        try:
            inspect.signature(function).bind(10)
        except TypeError:
            continue
        if right(function):
            return f"{function.__name__}(10) is right"
    raise AssertionError("no function of one number gives Fibonacci numbers" if made else "no function was defined")
