"""Code in a fresh interpreter."""

import os
import subprocess
import sys
import textwrap


def run_python(code, **environment):
    """Run `code` in a fresh interpreter; return what it printed, errors included."""
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stdout
    return completed.stdout
