"""Progress bars: on a terminal, with a tqdm that works, else none."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from trainlib.errors import BROKEN

Item = TypeVar("Item")


def bar(items: Iterable[Item], title: str, unit: str = "it") -> Iterable[Item]:
    """Return the items, with a bar on a terminal while they are taken; `unit` names one."""
    try:
        from tqdm import tqdm

        off = None if sys.stderr else True  # None: off unless stderr is a terminal
        return tqdm(items, title, unit=unit, disable=off, leave=False)
    except BROKEN:  # not installed, or broken in any way
        return items
