"""Make frozen dataclasses by the thousand.

The `__init__` of a frozen dataclass sets each field through `object.__setattr__`, which for an event is more than all
other work of reading it. What is made here is the same object, with all of its fields given at once.
"""

from typing import Any, TypeVar

Record = TypeVar("Record")


def record(cls: type[Record], fields: dict[str, Any]) -> Record:
    """Return an object of a frozen dataclass that keeps its fields in `__dict__`.

    Shape:  `fields` has every field of the class, defaults too, and belongs to the object from now on.
            `__post_init__` runs, as it would otherwise.
    """
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", fields)
    check = getattr(made, "__post_init__", None)
    if check is not None:
        check()
    return made
