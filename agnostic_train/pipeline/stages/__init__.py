"""What each stage of a run does: from the files of the stages before it to its own."""
