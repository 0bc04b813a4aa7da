"""Tasks by name (data.task). To add one, write its file and list it here."""

from cddistill.data.tasks.canny import Canny
from cddistill.data.tasks.depth import Depth
from cddistill.data.tasks.edit import Editing
from cddistill.data.tasks.inpaint import Inpainting
from cddistill.data.tasks.none import Unconditional
from cddistill.data.tasks.sr import SuperResolution

TASKS = {
    "none": Unconditional,
    "sr": SuperResolution,
    "inpaint": Inpainting,
    "edit": Editing,
    "depth": Depth,
    "canny": Canny,
}
