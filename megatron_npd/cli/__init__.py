"""The commands of ``npd``, one thin file each: parse the configuration, call one function."""
