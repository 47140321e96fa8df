"""The command `billhook`, and `python -m billhook`: signals are handled before anything large is imported."""

import json
import sys

from billhook import signals


def main() -> None:
    """Run the command line; see `billhook.cli.main`."""
    signals.install()
    try:
        from billhook.cli import main as run
    except KeyboardInterrupt:
        print(f"billhook: {signals.STOPPED}", file=sys.stderr, flush=True)
        if "--json" in sys.argv:
            print(json.dumps({"error": signals.STOPPED, "exit_code": 1}), flush=True)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
