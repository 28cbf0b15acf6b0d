"""For every test: threads that wait must not spin, since workers, browsers and other tests share the cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is first imported
