"""How OpenMP's threads wait for each other between two operations of torch: they look for a moment, then they sleep.

By default GNU's OpenMP, which torch brings, looks for milliseconds: where another process has one of the cores, a step
takes five to ten times as long. Threads that sleep at once have to be woken for each operation, which was an eighth of
quickstart's step on two quiet cores. In between, a wait costs neither (docs/decisions.md has the numbers).
"""

import os

# GNU's OpenMP spins as often as the second says; the first is for LLVM's, which knows no such number.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}


def choose_waiting() -> dict[str, str]:
    """The environment variables to set before torch is loaded; none where the user has set one of them."""
    return {} if WAITING.keys() & os.environ.keys() else dict(WAITING)
