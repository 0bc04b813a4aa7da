"""Images of tensorflow-datasets, which reads them without TensorFlow if they were prepared as ArrayRecord files."""

from cddistill.data.images import fit, from_array, to_rgb


class TfdsImages:
    """The dataset named config.path; needs a feature `image`, and may have `label` and `caption`."""

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
            raise ValueError(f"{config.path} has no feature `image`, but {', '.join(features)}")
        builder.download_and_prepare()  # does nothing if that was done before
        self.records = builder.as_data_source(slices(builder.info.splits)[split])
        self.num_labels = getattr(dict(features).get("label"), "num_classes", None) or 0
        self.name, self.size, self.null = config.path, config.size, config.num_classes

    def __len__(self):
        return len(self.records)

    def element(self, i, rng):
        """Image i."""
        record = self.records[i]
        name = f"image {i} of {self.name}"
        caption = record.get("caption", b"")
        label = record["label"] if self.num_labels else -1  # -1 is also how some say that their test split has none
        return {
            "image": fit(to_rgb(from_array(record["image"], name), name), self.size),
            "label": label if label >= 0 else self.null,
            "caption": caption.decode() if isinstance(caption, bytes) else str(caption),
        }


def slices(splits):
    """What to read for each of our splits: the dataset's own, else a tenth from the end of `train`."""
    ours = {name: name for name in ("validation", "test") if name in splits}
    end = 100
    for name in ("test", "validation"):
        if name not in ours:
            ours[name] = f"train[{end - 10}%:{end}%]"
            end -= 10
    return ours | {"train": f"train[:{end}%]"}
