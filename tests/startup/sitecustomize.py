"""What Python does first in the processes of `launch/test`: collect garbage less often.

Importing torch makes hundreds of thousands of objects that stay, and the collector looks at all of them again and
again. Each rank of each test does that, which is a tenth of the time of the whole suite.
"""

import gc

gc.set_threshold(50_000, 50, 100)
