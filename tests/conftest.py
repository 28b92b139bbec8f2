"""Puts the repository root on the path, so that tests import the scripts as they are."""
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # started in the background: what tests start would be deaf to
    signal.signal(signal.SIGINT, signal.default_int_handler)        # Ctrl-C, too, and they wait for its effect
