"""One file per revision; revisions are numbers, so that they compare."""
