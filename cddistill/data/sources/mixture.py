"""Several embedded sources as one data set."""

import dataclasses
from typing import Annotated

from cddistill.data.contracts import Source
from cddistill.data.splits import in_order
from cddistill.typed import SOME


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
    """The examples of several sources, concatenated and shuffled; each source has its default options."""

    mixture: Annotated[tuple[str, ...], SOME] = ("icons", "scenes")  # later ones' labels follow

    def open(self, config, split):
        from cddistill.data.sources import SOURCES  # which lists this class

        known = [name for name, cls in SOURCES.items() if not (cls.precomputed or cls is Mixture)]
        if unknown := [name for name in self.mixture if name not in known]:
            raise ValueError(f"data.mixture has {unknown[0]!r}: it may have {', '.join(known)}")
        return MixedImages({name: SOURCES[name]().open(config, split) for name in self.mixture})

    def fingerprint(self, opened):
        from cddistill.data.sources import SOURCES

        parts = {name: SOURCES[name]().fingerprint(source) for name, source in opened.sources.items()}
        return {f"{name}'s {kind}": text for name, part in parts.items() for kind, text in part.items()}


class MixedImages:
    """Examples of all sources in a fixed pseudo-random order, so that the first n are a random sample.

    Only what all of them have is kept: image, label and caption, for some also the edited image and its instruction.
    """

    def __init__(self, sources):
        self.sources = sources
        labels = [source.num_labels for source in sources.values()]
        self.num_labels = sum(labels)
        self.first_label = dict(zip(sources, (sum(labels[:k]) for k in range(len(labels))), strict=True))
        names = {f"{name}/{i}": (name, i) for name, source in sources.items() for i in range(len(source))}
        self.elements = [names[key] for key in in_order(names)]
        self.kept = set.intersection(*({*source.element(0, None)} for source in sources.values()))

    def __len__(self):
        return len(self.elements)

    def element(self, i, rng):
        """Example i."""
        name, row = self.elements[i]
        element = self.sources[name].element(row, rng)
        label = element["label"] + self.first_label[name]
        return {key: element[key] for key in self.kept} | {"label": label}
