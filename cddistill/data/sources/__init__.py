"""Data sources by name (data.source). To add a format, write its file and list it here."""

from cddistill.data.sources.array_record import ArrayRecords
from cddistill.data.sources.arrays import Arrays
from cddistill.data.sources.emoji import Emoji
from cddistill.data.sources.folder import Folder
from cddistill.data.sources.icon_edits import IconEdits
from cddistill.data.sources.icons import Icons
from cddistill.data.sources.mixture import Mixture
from cddistill.data.sources.parquet import ParquetFiles
from cddistill.data.sources.prompts import PromptFile
from cddistill.data.sources.scenes import Scenes
from cddistill.data.sources.tfds import TensorflowDatasets
from cddistill.data.sources.webdataset import WebDataset

SOURCES = {
    "emoji": Emoji,
    "icons": Icons,
    "icon_edits": IconEdits,
    "scenes": Scenes,
    "mixture": Mixture,
    "folder": Folder,
    "webdataset": WebDataset,
    "parquet": ParquetFiles,
    "array_record": ArrayRecords,
    "tfds": TensorflowDatasets,
    "arrays": Arrays,
    "prompts": PromptFile,
}
