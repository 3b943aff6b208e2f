"""`python -m streamllm`, and the command `streamllm`."""

import signal


def main() -> None:
    """Run the command line. Ctrl-C while it is imported ends the process without a traceback."""
    try:
        python_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not in the main thread
        python_handler = None
    from streamllm import cli

    if python_handler is not None:
        signal.signal(signal.SIGINT, python_handler)
    cli.main()


if __name__ == "__main__":
    main()
