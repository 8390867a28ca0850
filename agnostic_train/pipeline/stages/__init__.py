"""The stages of a run: each reads the files of the stages before it and writes its own."""
