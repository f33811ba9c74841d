"""Carries committed events to their handlers, and talks to the outside world.

`python -m` and Dramatiq look for modules where they are started first. Whoever may write there would run code in a
process that holds keys, so it is taken out before anything else of ours is imported. Procfile and `./dev` ask neither
for it; this is for those who start us by hand, whom `--path .` or PYTHONPATH give it back.
"""

import os
import sys


def _forget_current_directory() -> None:
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    asks_for_it = any(word.startswith(("--path", "-P")) for word in sys.argv)
    is_dramatiq = any(word.startswith("dovecote.bootstrap:") for word in sys.argv) and not asks_for_it
    # pathlib may be theirs
    here, root = os.path.realpath("."), os.path.realpath(f"{__path__[0]}/..")
    if here == root or not (module == ["workers"] or is_dramatiq):
        return
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]
    # `python -m` puts it there by its name, once, in front of what PYTHONPATH says.
    if module and not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == here:
        del sys.path[0]


_forget_current_directory()
