"""From a recipe to the files of a run: stages, what they are given, and what need not be run again."""
