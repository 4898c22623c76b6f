"""`python -m rasa_ext`: print what the build was made of, then check every op."""

import sys

from rasa_ext.build_info import build_info
from rasa_ext.self_check import self_check

for name, value in build_info().items():
    print(f"{name}: {' '.join(value) if isinstance(value, tuple) else value}")
sys.exit(0 if self_check() else 1)
