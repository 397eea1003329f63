__version__ = "0.1.0"

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait sleep, see chapter 30_hardware
