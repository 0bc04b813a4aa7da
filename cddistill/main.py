"""Command line: flags -> config -> one of MODES; nothing else.

python -m cddistill.main --config=configs/ccd_sr.py [--mode=MODE] [--workdir=DIR] [--config.FIELD=VALUE ...]
"""

import os
import signal
import sys

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "cddistill":  # before slow imports; `run` takes over
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import errno
import logging
import pathlib
import re
import shutil
from typing import Annotated

from absl import app, flags
from ml_collections import ConfigDict

import cddistill
from cddistill import io, lock, memory, remote, signals, typed
from cddistill.config_files import config_file, load_config, override

REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place to write to",
    errno.EDQUOT: "free some space, or choose another place to write to",
    errno.EROFS: "choose another place to write to",
    errno.EACCES: "change its permissions, or choose another place",
}
OF_ASSETS = ("data", "models")  # parts of the package with embedded images and weights
MODES = ("train", "evaluate", "sample", "demo", "export", "encode", "pairs", "plan")
CONFIG = flags.DEFINE_string(
    "config", None, "Experiment: configs/ccd_sr.py or configs/ccd_sr.py:sd21; cddistill:ccd_sr, that of the package."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<name of the config>.")
MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
INPUT = flags.DEFINE_string("input", None, "sample: the image, .npy map or folder of them that conditions the student.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "sample: a text; give it again for a grid of several.")
LABEL = flags.DEFINE_multi_string("label", [], "sample: class labels, as in --label=0,3.")
NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "sample: what guidance leads away from, instead of the empty prompt."
)
NUMBER = flags.DEFINE_string("n", None, "sample: images for each prompt, label or input (1); without any, in all (64).")
TILES = flags.DEFINE_bool("tiles", False, "sample: generate large inputs at their own size, in overlapping tiles.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "evaluate, sample, demo, export: which checkpoint, latest, best or a step."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "sample: the image (or folder, if the input is one); export: the folder, *.stablehlo or *.onnx, of a metric "
    "*.safetensors; encode, pairs: the folder, for pairs by default config.data.pairs; plan: the file, plan.json.",
)
HUB = flags.DEFINE_string("push_to_hub", "", "export: the repository user/name (a Space with --space) of the folder.")
SPACE = flags.DEFINE_bool("space", False, "export: also what a Hugging Face Space needs to show the demo's page.")
RANK = flags.DEFINE_string("lora_rank", "", "export: reduce a fully trained student to a LoRA of this rank, as in 16.")
PAGE = flags.DEFINE_bool("page", False, "export: a folder with a page to play with, for a browser (extra onnx).")
RUNTIME = flags.DEFINE_string(
    "onnxruntime_web", "", "export --page: the npm package of that name, its file or folder; default: npm gets it."
)
MODEL = flags.DEFINE_string("model", None, "demo: a run, diffusers folder, Hub id or pocket; needs no --config.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "demo: the address that serves the page; 0.0.0.0: all of this machine.")
PORT = flags.DEFINE_string("port", "7860", "demo: the port of the page.")
TOPOLOGY = flags.DEFINE_string("topology", "", "plan: devices, as in v5p:2x2x2 or h100:8; default: those here.")
MEMORY = flags.DEFINE_string("device-memory", "", "plan: GB that a device has; default: what its kind has.")
OPTIONS = (CONFIG, MODE, WORKDIR, OUTPUT, CHECKPOINT, HUB, INPUT, PROMPT, LABEL, NEGATIVE, NUMBER, TILES)
OPTIONS = (*OPTIONS, SPACE, RANK, PAGE, RUNTIME, MODEL, HOST, PORT, TOPOLOGY, MEMORY)
USED_BY = {
    **dict.fromkeys(("input", "prompt", "label", "negative_prompt", "n", "tiles"), ("sample",)),
    **dict.fromkeys(("topology", "device-memory"), ("plan",)),
    **dict.fromkeys(("model", "host", "port"), ("demo",)),
    **dict.fromkeys(("push_to_hub", "space", "lora_rank", "page", "onnxruntime_web"), ("export",)),
    "output": ("sample", "export", "encode", "pairs", "plan"),
    "checkpoint": ("evaluate", "sample", "demo", "export"),
}
HELP = {"--help", "-help", "-h", "-?", "--helpfull", "--helpshort"}
OVERRIDE = re.compile(r"--?(no)?config\.(.+)", re.DOTALL)


def main(settings):
    """Run the mode; heavy imports happen here, so that a wrong flag is reported at once."""
    quieten()
    from cddistill import api, commands, config, sharding, train

    if MODE.value == "demo":
        return demonstrate(settings)
    experiment = config.resolve(settings)
    if MODE.value == "plan":  # before a device is touched
        output = OUTPUT.value or f"{WORKDIR.value or default_workdir()}/plan.json"
        return commands.plan_run(settings, TOPOLOGY.value, MEMORY.value, output)
    sharding.initialize(training=MODE.value == "train")
    signals.stand_before()
    sharding.check_devices()
    workdir, which = io.path(WORKDIR.value or default_workdir()), CHECKPOINT.value
    if MODE.value == "train":
        return train.train(settings, workdir)
    if MODE.value == "evaluate":
        return commands.evaluate_run(settings, workdir, which)
    output = os.path.expanduser(OUTPUT.value or (experiment.data.pairs if MODE.value == "pairs" else ""))
    if not output:
        raise ValueError(f"--mode={MODE.value} needs --output")
    if MODE.value == "encode":
        return commands.encode_data(settings, io.path(output))
    if MODE.value == "pairs":
        return commands.make_pairs(settings, io.path(output))
    if MODE.value == "export" and PAGE.value:
        return commands.export_page(settings, workdir, output, which, RUNTIME.value)
    if MODE.value == "export":
        rank = typed.fit(typed.parse([RANK.value], 0, "--lora_rank"), typed.Count, "--lora_rank") if RANK.value else 0
        return commands.export_run(settings, workdir, output, which, HUB.value, SPACE.value, rank=rank)
    n = NUMBER.value and typed.parse([NUMBER.value], 0, "--n")
    labels = typed.fit(typed.parse(LABEL.value, (), "--label"), tuple[int, ...], "--label")
    source = INPUT.value and str(io.local(INPUT.value))
    wanted = PROMPT.value, labels, NEGATIVE.value, n, source, TILES.value
    return api.sample_run(settings, workdir, output, which, *wanted)


def demonstrate(settings):
    """--mode=demo. What is wrong with its options is said before a model is read."""
    from cddistill import demo, sharding

    number = Annotated[int, typed.within(least=1, most=65535)]
    port = typed.fit(typed.parse([PORT.value], 0, "--port"), number, "--port")
    if MODEL.value and WORKDIR.value:
        raise ValueError("--model and --workdir both name a model: leave one out")
    demo.check_installed()
    sharding.check_devices()
    workdir = io.path(WORKDIR.value or default_workdir()) if CONFIG.value or WORKDIR.value else None
    demo.serve(demo.opened(settings, MODEL.value, workdir, CHECKPOINT.value), HOST.value, port)


def quieten() -> None:
    """One sentence for an error: orbax and asyncio log tracebacks of errors that are also raised here."""
    logging.getLogger().setLevel(logging.WARNING)  # absl starts it at INFO
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # names of folders may be any bytes
    if not os.environ.get("CDDISTILL_TRACEBACK"):
        for name in ("absl", "asyncio"):  # orbax logs by absl
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None  # of tasks that orbax leaves behind when a file is damaged


def default_workdir() -> pathlib.Path:
    """runs/ccd_sr for configs/ccd_sr.py, runs/ccd_sr-sd21 for configs/ccd_sr.py:sd21."""
    path, variant = config_file(CONFIG.value)
    return pathlib.Path("runs") / "-".join(filter(None, (path.stem, variant)))


# ---- from arguments to a config


def parse(argv):
    """The config that the arguments describe; any mistake in them, or in the config file, is one sentence."""
    try:
        if "--version" in argv:
            print(f"cddistill {cddistill.__version__}")
            sys.exit(0)
        argv = with_files(argv)
        asked = bool(HELP & {*argv})
        arguments, overrides = split([x for x in argv if x not in HELP])
        rest = parse_options(arguments, known_only=asked)
        named = MODE.value == "demo" and (MODEL.value or WORKDIR.value) and not overrides
        if CONFIG.value is None and not asked and not named:
            raise ValueError("--config is missing: try --config=configs/ccd_sr.py")
        if len(rest) > 1 and not asked:
            raise ValueError(f"unexpected argument {rest[1]!r}: options start with --, values follow =")
        check_mode()
        settings = None if CONFIG.value is None else override(load_config(CONFIG.value), overrides, CONFIG.value)
        if asked:
            print(usage(settings))
            sys.exit(0)
    except (flags.Error, OSError, ValueError) as error:
        if os.environ.get("CDDISTILL_TRACEBACK"):
            raise
        fail(error)
    return settings


def with_files(argv: list[str]) -> list[str]:
    """The arguments, with the lines of a --flagfile in its place: absl itself would not know the fields in it."""
    try:
        return [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
    except (flags.Error, UnicodeDecodeError) as error:
        given = next(x for x in argv if "flagfile" in x)
        why = str(error).rpartition("flagfile: ")[2]
        raise ValueError(f"{given} cannot be read ({why}): it names a text file with an option in each line") from error


def split(argv: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """(other arguments, [(field, text)]) of a command line; the text of --config.remat is "true", of --noconfig.remat
    "false", and in --config.steps 5 the next argument."""
    others, overrides, argv = [], [], list(argv)
    while argv:
        argument = argv.pop(0)
        if not (found := OVERRIDE.fullmatch(argument)):
            others.append(argument)
            continue
        field, equals, text = found[2].partition("=")
        if found[1]:
            text = "false"
        elif not equals:
            text = argv.pop(0) if argv and not re.match("--?[A-Za-z]", argv[0]) else "true"
        overrides.append((field, text))
    return others, overrides


def parse_options(arguments: list[str], known_only: bool) -> list[str]:
    """absl's parser, with a hint for an option that it does not know. Returns what is no option."""
    try:
        return flags.FLAGS(arguments, known_only=known_only)
    except flags.UnrecognizedFlagError as error:
        from cddistill.config import owners

        spec = flags.FLAGS["config"].value  # read, although the others failed
        fields = io.flatten(load_config(spec).to_dict()) if spec else owners()
        options = [option.name for option in OPTIONS]
        near = typed.nearest(error.flagname, [*options, *fields])
        hint = f"did you mean --{'' if near in options else 'config.'}{near}?" if near else "--help lists them all"
        raise ValueError(f"unknown option --{error.flagname}: {hint}") from error


def check_mode() -> None:
    """ValueError for a mode that is not one of MODES, and for options that it does not use."""
    typed.choose("--mode", dict.fromkeys(MODES), MODE.value)
    for option, modes in USED_BY.items():
        if flags.FLAGS[option].present and MODE.value not in modes:
            raise ValueError(f"--{option} is for --mode={' or '.join(modes)}, not {MODE.value}: leave it out")
    if RUNTIME.value and not PAGE.value:
        raise ValueError("--onnxruntime_web is for --page: add it, or leave both out")
    if HUB.value and PAGE.value:
        raise ValueError("--push_to_hub is for a diffusers folder, and --page writes another: leave one out")
    if RANK.value and PAGE.value:
        raise ValueError("--lora_rank is for a diffusers folder, and --page writes another: leave one out")
    if SPACE.value and PAGE.value:
        raise ValueError("--space adds a page to a diffusers folder, and --page writes another folder: leave one out")


def usage(settings: ConfigDict | None) -> str:
    """--help: the options, and the fields of the config with their values and comments."""
    from cddistill.config import describe

    texts = {o.name: flags.FLAGS[o.name].help.partition(";\n")[0] for o in OPTIONS}  # absl adds how to repeat one
    options = "\n".join(f"  --{name:<16} {text}" for name, text in texts.items())
    of = CONFIG.value if settings is not None else "a config (with --config: of that file)"
    return f"{__doc__.splitlines()[2]}\n\n{options}\n\nFields of {of}:\n\n" + "\n".join(describe(settings))


# ---- errors


def sentence(error: BaseException) -> str:
    """An error as one line; those of the disk are reworded."""
    if isinstance(error, shutil.Error):  # (from, to, why) of every file
        _, place, why = error.args[0][0]
        return f"{place} cannot be written ({why}): free some space, or choose another place"
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        parts = map(os.fsdecode, filter(None, (error.filename, error.strerror)))
        return "; ".join(filter(None, (" ".join(": ".join(parts).split()), REMEDIES.get(error.errno))))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = " ".join(" ".join(lines).split())
    shipped = any(f"{pathlib.Path(cddistill.__file__).parent / part / 'assets'}{os.sep}" in said for part in OF_ASSETS)
    return said + "; it is part of this package: reinstall cddistill" * (shipped and "reinstall" not in said)


def fail(error: BaseException):
    """Print the error as one sentence, after its notes, and exit with status 2, or 1 for what may be tried again."""
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    print(f"cddistill: {sentence(error)}", file=sys.stderr, flush=True)
    status = 1 if isinstance(error, lock.InUse) else 2
    os._exit(status)  # also from threads and under jax.distributed, where a lone exit would wait for the others


def guarded(settings):
    """`main`, with expected errors as one sentence; any other keeps its traceback. Several hosts end together."""
    try:
        status = main(settings)
        from cddistill import sharding  # slow, and `main` quietens it

        sharding.wait_for_others()
        return status
    except Exception as error:
        full = isinstance(error, RuntimeError) and memory.EXHAUSTED in str(error)  # as JAX says it
        expected = isinstance(error, ValueError | FloatingPointError | OSError) or full or remote.of_client(error)
        if not expected or os.environ.get("CDDISTILL_TRACEBACK"):
            raise
        fail(ValueError(memory.exhausted(str(error), MODE.value, settings.to_dict())) if full else error)


def run():
    """Entry point of the console script `cddistill`. Ctrl-C ends it quietly with status 130, SIGTERM with 143."""
    signals.catch()
    try:
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt as error:
        sys.stdout.flush()
        os._exit(error.args[0] if error.args else 130)
    finally:
        signals.end_quietly()  # also while the interpreter shuts down


if __name__ == "__main__":
    run()
