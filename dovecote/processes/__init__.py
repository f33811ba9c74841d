"""Child processes, and files and terminals that are shared with other users of the machine."""
