"""The command line: one thin function per verb, and how errors and progress look on a terminal."""
