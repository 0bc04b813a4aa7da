"""Images from tensorflow-datasets, prepared as ArrayRecord files: these are read without TensorFlow."""

import dataclasses
from pathlib import Path

from cddistill.data.contracts import Source
from cddistill.data.crops import CROPS, kept
from cddistill.data.images import from_array, to_rgb

INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class TensorflowDatasets(Source):
    """The tensorflow dataset named data.path, or the one that was prepared in the folder data.path. No options."""

    sized = True

    def open(self, config, split):
        return TfdsImages(config, split)

    def fingerprint(self, opened):
        return {"data set": f"{opened.version}, {len(opened)} pictures"}


class TfdsImages:
    """Images of a dataset with a feature `image` and optionally `label` and `caption`."""

    def __init__(self, config, split):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError("data.source tfds needs tensorflow-datasets: pip install cddistill[tfds]") from error
        builder = builder_of(tfds, config.path)
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"{config.path} (data.path) has no feature `image`, only {', '.join(features)}")
        self.records = builder.as_data_source(slices(builder.info.splits)[split])
        self.num_labels = getattr(dict(features).get("label"), "num_classes", None) or 0
        self.version = builder.info.full_name
        self.name, self.size, self.null = config.path, config.size, config.num_classes

    def __len__(self):
        return len(self.records)

    def element(self, i, rng):
        """Image i."""
        record = self.records[i]
        name = f"image {i} of {self.name}"
        caption = record.get("caption", b"")
        label = record["label"] if self.num_labels else -1  # some datasets mark a test split without labels by -1
        image = to_rgb(from_array(record["image"], name), name)
        element = CROPS["resize"].cut(kept(CROPS["resize"], self.size, name, image, {}), self.size, rng)
        return element | {
            "label": label if label >= 0 else self.null,
            "caption": caption.decode() if isinstance(caption, bytes) else str(caption),
        }


def builder_of(tfds, path: str):
    """The builder of a data set that is there: by its name, prepared now if it is not, or of a folder like
    mnist/3.0.1, as `download_and_prepare` leaves it. Raises ValueError for others and for files of another format."""
    folder = Path(path).expanduser()
    if not (folder.is_dir() and ("/" in path or (folder / INFO).is_file())):
        try:
            builder = tfds.builder(path, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"tensorflow-datasets has no dataset {path!r}, and there is no such folder (data.path)"
            ) from error
        builder.download_and_prepare()  # does nothing if already prepared
        return builder
    if not (folder / INFO).is_file():
        inside = sorted(x.parent.relative_to(folder).as_posix() for x in folder.glob(f"**/{INFO}"))
        hint = f"one of {', '.join(inside[:3])} in it" if inside else "one that tensorflow-datasets prepared"
        raise ValueError(f"the folder {path} (data.path) has no {INFO}: set it to {hint}")
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # damaged JSON, unknown features: many types
        raise ValueError(f"the dataset in {path} (data.path) cannot be opened ({error}): prepare it again") from error
    found = builder.info.file_format
    if found is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"the dataset in {path} (data.path) has {getattr(found, 'value', 'unknown')} files, and only ArrayRecord "
            "can be read at random: prepare it again with file_format='array_record'"
        )
    return builder


def slices(splits):
    """The tfds slice of each split: the dataset's own split if it exists, else 10 % from the end of `train`."""
    slice_of = {name: name for name in ("validation", "test") if name in splits}
    end = 100
    for name in ("test", "validation"):
        if name not in slice_of:
            slice_of[name] = f"train[{end - 10}%:{end}%]"
            end -= 10
    return slice_of | {"train": f"train[:{end}%]"}
