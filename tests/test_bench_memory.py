"""bench/memory.py: a process that keeps the memory that it frees."""

from launchers import launch

KEEP = """
import resource
import torch
from syncnorm.bench import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
assert memory.keep()
for _ in range(8):
    faults()  # the heap grows until it has room
print(returned, faults())
"""


def test_memory_that_is_kept_has_no_page_faults(tmp_path):
    script = tmp_path / "keep.py"
    script.write_text(KEEP)
    done = launch("alone", 1, script)
    assert done.returncode == 0, done.stderr
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 4
