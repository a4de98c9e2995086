"""``npd train``, by the name that Megatron users look for; in one process, or under torchrun."""

from megatron_npd.__main__ import main

if __name__ == "__main__":
    main("train")
