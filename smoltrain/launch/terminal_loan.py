"""The terminal while ranks start: the supervisor's moving line, until the first of them has something to show.

A rank asks before its first character (console.py), and waits until the line is erased: no two processes draw at once.
"""

import select
import socket

from smoltrain.terminal import ActivityLine, LiveLine, open_console


class TerminalLoan:
    """A line that says what is waited for, and the socket by which a child takes the console over.

    Through a pipe there is no line, but it is known all the same whether a child has begun to speak.
    """

    def __init__(self, text: str) -> None:
        console = open_console()
        self._line = LiveLine(console, ActivityLine(console, text))
        self._own, self._childrens = socket.socketpair()
        self.is_taken = False  # some child has something to show
        self._line.start()

    @property
    def inherited(self) -> int:
        """The file descriptor that each child gets."""
        return self._childrens.fileno()

    def poll(self) -> None:
        """Erase the line if a child has asked for the console. To be called every few hundredths of a second."""
        if not self.is_taken and select.select([self._own], [], [], 0)[0]:
            self.is_taken = True
            self.close()

    def close(self) -> None:
        """Erase the line, and tell so whoever waits for that."""
        self._line.stop()
        self._own.close()
        self._childrens.close()
