"""Evaluation during training: an image grid of fixed validation examples, or the scores of a metric."""

import functools
from pathlib import PurePath

import jax
import numpy as np

from cddistill import data, generate, sharding
from cddistill.build import Parts
from cddistill.evals import fidelity, grids
from cddistill.method import Generator


def preview(parts: Parts):
    """The preview of a run: preview(state, step, workdir, writer) -> scores. It depends on the kind of method."""
    return Preview(parts) if isinstance(parts.experiment.method, Generator) else Validation(parts)


class Preview:
    """Samples for n fixed validation examples."""

    def __init__(self, parts: Parts, n: int = generate.PREVIEWED):
        self.parts, self.n, self.batch, self.truth = parts, n, None, None

    def __call__(self, state, step: int, workdir: PurePath, writer) -> dict[str, float]:
        """Write samples/<step>.png. The score uses the last of sample_steps: PSNR, or diversity without a condition."""
        if self.batch is None:
            self.load()
        run, task = self.parts.experiment.run, self.parts.experiment.data.task
        student = generate.student_of(self.parts, state)
        sample = functools.partial(generate.sample, student, self.batch, task=task, what="")  # the run's bar is there
        rows = {f"{k} steps": sample(k, run.seed) for k in run.sample_steps}
        generated = rows[f"{run.sample_steps[-1]} steps"]
        if self.truth is not None:
            rows = {"input": task.picture(self.batch["cond"])} | rows | {"truth": self.truth}
            scores = {"val/psnr": float(np.mean(fidelity.psnr(generated, self.truth)))}
        else:
            others = sample(run.sample_steps[-1], run.seed + 1)
            scores = {"val/diversity": diversity(generated, others)}
        if sharding.is_host0():
            grids.save_image(workdir / "samples" / f"{step:06d}.png", grids.side_by_side(rows))
            writer.write_images(step, {"samples": np.concatenate([grids.to_uint8(x[..., :3]) for x in rows.values()])})
            writer.write_scalars(step, scores)
        return scores

    def load(self) -> None:
        """Load the examples and, if they have a condition, their target images."""
        examples = data.examples(self.parts.experiment.data, "validation", self.n)
        self.batch = generate.batch_of(self.parts, examples)
        if "cond" in self.batch:
            self.truth = generate.targets(self.parts, examples)


class Validation:
    """Scores of n fixed validation images."""

    def __init__(self, parts: Parts, n: int = 256):
        self.parts, self.n, self.batch = parts, n, None

    def __call__(self, state, step: int, workdir: PurePath, writer) -> dict[str, float]:
        """The mean of each score; samples/<step>.png if the method shows pictures."""
        if self.batch is None:
            examples = data.examples(self.parts.experiment.data, "validation", self.n)
            self.batch = generate.encoded(self.parts, examples)
        student = generate.student_of(self.parts, state)
        each = generate.score(student, self.batch, self.parts.experiment.run.seed)
        scores = {f"val/{name}": float(x.mean()) for name, x in each.items()}
        shown = generate.pictures(student, jax.tree.map(lambda x: x[:8], self.batch))
        if sharding.is_host0():
            writer.write_scalars(step, scores)
            if shown:
                grids.save_image(workdir / "samples" / f"{step:06d}.png", grids.side_by_side(shown))
        return scores


def diversity(a, b) -> float:
    """How much images depend on the noise: mean squared difference of two samples a, b [n, ...] of the same examples
    over twice their total variance. 0 if the noise has no effect; at most about 1."""
    return float(np.mean((a - b) ** 2) / max(2.0 * np.var(np.stack([a, b]), axis=(0, 1)).mean(), 1e-12))
