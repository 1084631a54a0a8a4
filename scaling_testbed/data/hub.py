"""What the Hugging Face Hub's libraries say while they try to reach it."""

import logging
import re

from scaling_testbed.progress import say

LOGGERS = ("huggingface_hub.utils._http", "datasets.utils.file_utils")  # of each attempt and its wait


class Retries(logging.Filter):
    """Replaces the lines that the libraries log for each attempt to reach the Hub by one line, the first time."""

    def __init__(self):
        super().__init__()
        self.said = False

    def install(self) -> None:
        """Filter what the two libraries log; a second call changes nothing."""
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        problem, failed, _ = text.partition(" thrown while requesting ")
        if not (failed or "Retrying in " in text):
            return True
        if not self.said:
            self.said = True
            system = re.search(r"\[Errno -?\d+\] [^\"')]*", problem)  # within what some versions show as nested tuples
            reason = (system[0] if system else problem.strip("'")) if failed else "the connection was lost"
            say(f"the Hugging Face Hub does not answer ({reason}); trying again", errors=True)
        return False


RETRIES = Retries()
