"""Command line: flags -> config -> one of MODES; nothing else.

python -m cddistill.main --config=configs/ccd_sr.py [--workdir=DIR] [--config.FIELD=VALUE ...]
"""

import errno
import logging
import os
import pathlib
import re
import shutil
import sys

from absl import app, flags
from ml_collections import config_flags

REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place to write to",
    errno.EDQUOT: "free some space, or choose another place to write to",
    errno.EROFS: "choose another place to write to",
    errno.EACCES: "change its permissions, or choose another place",
}
MODES = ("train", "evaluate", "sample", "export", "encode", "pairs")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, e.g. configs/ccd_sr.py or configs/ccd_sr.py:sd21."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<name of the config>.")
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
INPUT = flags.DEFINE_string("input", None, "sample: the image, or folder of images, that conditions the student.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "sample: a text; give it again for a grid of several.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "evaluate, sample, export: which checkpoint, latest, best or a step."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "sample: the image (or folder, if the input is one); export: the folder, *.stablehlo or *.onnx, of a metric "
    "*.safetensors; encode, pairs: the folder, for pairs by default config.data.pairs.",
)


def default_workdir() -> pathlib.Path:
    """runs/ccd_sr for configs/ccd_sr.py, runs/ccd_sr-sd21 for configs/ccd_sr.py:sd21."""
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return pathlib.Path("runs") / "-".join(filter(None, (pathlib.Path(path).stem, variant)))


def main(_):
    """Run the mode; heavy imports happen here, so that a wrong flag is reported at once."""
    logging.getLogger().setLevel(logging.WARNING)  # absl starts it at INFO
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's
    from cddistill import api, commands, sharding, train

    sharding.initialize()
    if PROMPT.value and (MODE.value != "sample" or INPUT.value):
        raise ValueError("--prompt is for --mode=sample without --input")
    workdir, which = pathlib.Path(WORKDIR.value or default_workdir()), CHECKPOINT.value
    if MODE.value == "train":
        return train.train(CONFIG.value, workdir)
    if MODE.value == "evaluate":
        return commands.evaluate_run(CONFIG.value, workdir, which)
    output = OUTPUT.value or (CONFIG.value.data.pairs if MODE.value == "pairs" else "")
    if not output:
        raise ValueError(f"--mode={MODE.value} needs --output")
    if MODE.value == "encode":
        return commands.encode_data(CONFIG.value, pathlib.Path(output))
    if MODE.value == "pairs":
        return commands.make_pairs(CONFIG.value, pathlib.Path(output))
    if MODE.value == "export":
        return commands.export_run(CONFIG.value, workdir, output, which)
    if PROMPT.value:
        return api.sample_prompts(CONFIG.value, workdir, PROMPT.value, output, which)
    return commands.sample(CONFIG.value, workdir, INPUT.value, output, which)


def parse(argv):
    """absl's flag parser, with errors in a config file or an override as one sentence."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise ValueError("--config is missing: try --config=configs/ccd_sr.py")
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}: options start with --, values follow =")
    except (flags.Error, AttributeError, KeyError, ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        fail(error)
    return rest


def sentence(error: BaseException) -> str:
    """An error as one line; those of flag parsers and of the disk are reworded."""
    if isinstance(error, shutil.Error):  # (from, to, why) of every file
        _, place, why = error.args[0][0]
        return f"{place} cannot be written ({why}): free some space, or choose another place"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{': '.join(filter(None, (error.filename, error.strerror)))}; {REMEDIES[error.errno]}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = " ".join(" ".join(lines).split())
    if "Traceback" in said:  # config_flags wraps a config file's own error in its traceback
        return lines[-1].partition(": ")[2]
    if near := re.search(r'Did you mean "(.+)" instead of "(.+)"', said):  # from inside layers of quotes
        return f"unknown config key {near[2]!r}: did you mean {near[1]!r}?"
    if isinstance(error, (AttributeError, KeyError)):
        return f"unknown config key {said}"
    if missing := re.search(r"No such file or directory: '(.+\.py)'", said):
        return f"config file {missing[1]} does not exist; start in the folder that holds configs/, or give a full path"
    return said


def fail(error: BaseException):
    """Print the error as one sentence and exit with status 2 (1 is for crashes)."""
    print(f"cddistill: {sentence(error)}", file=sys.stderr, flush=True)
    os._exit(2)  # also from threads and under jax.distributed, where a lone exit would wait for the others


def guarded(argv):
    """`main`, with expected errors as one sentence; any other keeps its traceback."""
    try:
        return main(argv)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("CDDISTILL_TRACEBACK"):
            raise
        fail(error)


def run():
    """Entry point of the console script `cddistill`."""
    app.run(guarded, flags_parser=parse)


if __name__ == "__main__":
    run()
