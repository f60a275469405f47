"""The command line: `kat <verb>`."""


def main() -> None:
    """Run `kat`."""
