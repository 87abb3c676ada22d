"""Code in a fresh interpreter."""

import os
import sys
import textwrap

from processes import output_of


def run_python(code, timeout=60, **environment):
    """Run `code` in a fresh interpreter; return what it printed, errors included."""
    return output_of(sys.executable, "-c", textwrap.dedent(code), env=os.environ | environment, timeout=timeout)
