"""The programs of docs/start.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = {  # those of several ranks, by their launcher
    launcher: f"# {launcher} {code}"
    for launcher, code in re.findall(
        r"```python\n# (torchrun|mpirun) (.*?)```", (ROOT / "docs/start.md").read_text(), re.DOTALL
    )
}
