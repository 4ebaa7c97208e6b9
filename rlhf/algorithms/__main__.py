"""Print the documentation of the algorithms, or write it to docs/algorithms.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf.algorithms.page import FILE, page, section
from rlhf.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after an error message about a name that no algorithm has."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.algorithms", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="algorithms to print; all and their parts without")
    parser.add_argument("--write", action="store_true", help=f"write docs/{FILE.name}")
    options = parser.parse_args(arguments)
    try:
        text = "\n\n".join(map(section, options.names)) + "\n" if options.names else page()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.write:
        FILE.write_text(page())
        print(f"wrote {FILE}")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
