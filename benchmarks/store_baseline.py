"""Store what a config's baseline generates for the test split in its folder, where evaluations find it.

python benchmarks/store_baseline.py configs/ccd_sr.py 50       images of 50 steps, in 16 bits
"""

import argparse
import pathlib
import runpy

from cddistill import checksums, config, data, generate
from cddistill.build import build
from cddistill.evals import compare, stored


def main():
    """Generate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument(
        "steps", type=int, help="number of sampling steps, at even timesteps unless the student has as many"
    )
    args = parser.parse_args()
    experiment = config.resolve(runpy.run_path(args.config)["get_config"]())
    parts, run = build(experiment, {"test": "the baseline is sampled on it"}), experiment.run
    batch = generate.batch_of(parts, data.examples(experiment.data, "test", run.eval_images))
    student, folder = compare.load_baseline(parts)(args.steps), compare.baseline_folder(run)
    images = generate.sample(student, batch, args.steps, run.seed, task=experiment.data.task)
    print(stored.write(folder, student, batch, args.steps, run.seed, images))
    if (pathlib.Path(folder) / checksums.DIGESTS).is_file():
        checksums.write_shipped(folder)


if __name__ == "__main__":
    main()
