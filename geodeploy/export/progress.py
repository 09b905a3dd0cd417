"""Lines that tell which step of a long work has begun, and after how long."""

import logging
import time


class Steps:
    """So many steps, told one by one through ``log``."""

    def __init__(self, log: logging.Logger, number: int) -> None:
        self._log, self._number = log, number
        self._begun, self._started = 0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def begin(self, what: str) -> None:
        """Tell that the next step, ``what``, begins."""
        self._begun += 1
        told = f"Step {self._begun} of {self._number}, after {self.seconds:.0f} s: {what} ..."
        self._log.info("%s", told)
