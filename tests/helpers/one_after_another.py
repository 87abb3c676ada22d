"""Run several commands of Python one after another in this process, which may be a rank of a job.

    python one_after_another.py '[["a.py", "--option"], ["b.py"]]'

What their imports take is spent once.
"""

import json
import runpy
import sys
from pathlib import Path

for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
