"""Everything but the method itself: one file per command or optional engine. See refrag.py."""

import runpy


def main() -> None:
    """The installed script `refrag`: like refrag.py it parses the command line before the heavy imports."""
    runpy.run_module("refrag", run_name="__main__", alter_sys=True)
