"""Tasks by name (data.task). To add one, write its file and list it here."""

from cddistill.data.tasks.none import Unconditional
from cddistill.data.tasks.sr import SuperResolution

TASKS = {
    "none": Unconditional,
    "sr": SuperResolution,
}
