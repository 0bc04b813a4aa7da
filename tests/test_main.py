"""The command line on mistakes: exit status 2, one sentence, nothing written."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from cddistill.main import sentence

ROOT = pathlib.Path(__file__).parents[1]


def cddistill(*flags, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "cddistill.main", *flags], env=env, cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            [f"--config={ROOT}/configs/ccd_sr.py", "--config.optim.lrr=1"],
            "unknown config key 'lrr': did you mean 'lr'?",
        ),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--config.batch_sise=1"], "'batch_sise': did you mean 'batch_size'?"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--config.zzz=1"], "unknown config key"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--config.batch_size=many"], "batch_size"),
        ([f"--config={ROOT}/configs/nothing.py"], "nothing.py does not exist"),
        ([f"--config={ROOT}/configs/ccd_sr.py:huge"], "no variant 'huge'"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--mode=play"], "mode"),
        ([], "--config is missing"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--mode=sample"], "needs --output"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--mode=export", "--output=student"], "holds no run: train first"),
    ],
)
def test_mistakes_exit_with_one_sentence(flags, sentence, tmp_path):
    done = cddistill(*flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cddistill: ")
    assert sentence in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space, or"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system; choose another place"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; change its permissions"),
        (shutil.Error([("a", "b/c", "[Errno 28] No space")]), "b/c cannot be written ([Errno 28] No space): free some"),
        (OSError("one\n  two"), "one two"),
    ],
)
def test_os_errors_become_one_sentence(error, said):
    assert sentence(error).startswith(said)
