"""One of two processes of one device that evaluate together: `python two_hosts_protocol.py WORKDIR DATA TEACHER`.

test_published.py starts both and sets their environment.
"""

import pathlib
import sys

import pytest
import test_published

from cddistill import commands, sharding

workdir, data, teacher = map(pathlib.Path, sys.argv[1:])
sharding.initialize()
with pytest.MonkeyPatch.context() as patch:
    test_published.register(patch)
    commands.evaluate_run(test_published.settings_of(teacher, data), workdir)
