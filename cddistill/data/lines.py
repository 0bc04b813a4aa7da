"""The lines of a text file by number, such as millions of prompts: only where each lies is kept in memory."""

import functools
from pathlib import Path

import numpy as np

from cddistill import io
from cddistill.data.captions import check_text
from cddistill.data.listing import check_some

PIECE = 2**21  # bytes that are searched for ends of lines at a time
BLANK = 32  # bytes up to this are white space or control characters


class Lines:
    """The lines of a file in UTF-8 that are not blank, without white space at their ends. Several threads may read."""

    def __init__(self, path: Path):
        self.path, self.bytes = path, np.memmap(path, np.uint8, "r")
        ends, counts, total = [], [], 0
        for at in range(0, len(self.bytes), PIECE):
            piece = self.bytes[at : at + PIECE]
            found = np.flatnonzero(piece == ord("\n"))
            visible = total + np.cumsum(piece > BLANK)  # characters up to each byte
            ends.append(found + at)
            counts.append(visible[found])
            total = int(visible[-1])
        ends = np.concatenate([*ends, [len(self.bytes)]])  # the last line may have no end
        filled = np.diff(np.concatenate([*counts, [total]]), prepend=0) > 0
        self.spans = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], 1)[filled]  # start and end, int64 [n, 2]

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i: int) -> str:
        """Line i. Raises ValueError, naming it, if it is not UTF-8."""
        start, end = self.spans[i].tolist()
        try:
            return check_text(self.bytes[start:end].tobytes().decode("utf-8").removeprefix("\ufeff").strip())
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not text in UTF-8 from byte {start} on, in line {i + 1} without blank ones: save it "
                "as UTF-8"
            ) from error


@functools.lru_cache(maxsize=2)  # so that all splits share one look at the file
def open_lines(path: str, option: str) -> Lines:
    """The lines of a file that a config key names. Raises ValueError, in one sentence, for what is no such file.

    Only some lines are checked; others when they are read.
    """
    file = io.local(path)
    if not path or not file.is_file():
        raise ValueError(f"{option} {path!r} is no file: set it to a text file with a prompt on each line")
    lines = Lines(file) if file.stat().st_size else ()
    if not len(lines):
        raise ValueError(f"{option} {path} has no line: write a prompt on each")
    check_some(lines.__getitem__, len(lines), f"lines of {path}", skip_bad=False)
    return lines
