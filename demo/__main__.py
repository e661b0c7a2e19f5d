"""``python -m demo``: the program behind ``make demo``."""

from __future__ import annotations

import os
import sys

from demo import interrupts

#: The shell's exit code of a program that ended by Ctrl-C.
INTERRUPTED = 130


def main() -> int:
    """Run the demo and return its exit code."""
    interrupts.install()
    try:
        # Imported only now, so that Ctrl-C during the imports ends as cleanly as later.
        from demo import acts

        return acts.main()
    except KeyboardInterrupt:
        print("\nInterrupted. Everything that was started has ended.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone; without this Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
