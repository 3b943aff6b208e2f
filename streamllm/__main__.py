"""python -m streamllm: the same as the command streamllm."""

from streamllm.cli import main

if __name__ == "__main__":
    main()
