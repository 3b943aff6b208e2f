"""`python -m streamllm` is the command `streamllm`."""

from streamllm.cli import main

if __name__ == "__main__":
    main()
