"""Images from tensorflow-datasets, prepared as ArrayRecord files: these are read without TensorFlow."""

import dataclasses

from cddistill.data.contracts import Source
from cddistill.data.images import fit, from_array, to_rgb


@dataclasses.dataclass(frozen=True)
class TensorflowDatasets(Source):
    """The tensorflow dataset named data.path. No options."""

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
        try:
            builder = tfds.builder(config.path, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(f"tensorflow-datasets has no dataset {config.path!r} (data.path)") from error
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"{config.path} (data.path) has no feature `image`, only {', '.join(features)}")
        builder.download_and_prepare()  # does nothing if already prepared
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
        return {
            "image": fit(to_rgb(from_array(record["image"], name), name), self.size),
            "label": label if label >= 0 else self.null,
            "caption": caption.decode() if isinstance(caption, bytes) else str(caption),
        }


def slices(splits):
    """The tfds slice of each split: the dataset's own split if it exists, else 10 % from the end of `train`."""
    slice_of = {name: name for name in ("validation", "test") if name in splits}
    end = 100
    for name in ("test", "validation"):
        if name not in slice_of:
            slice_of[name] = f"train[{end - 10}%:{end}%]"
            end -= 10
    return slice_of | {"train": f"train[:{end}%]"}
