"""``npd convert``, by the name that Megatron users look for."""

from megatron_npd.__main__ import main

if __name__ == "__main__":
    main("convert")
