"""Documents: which files a source has, how their records are read, what is tried again and what is held out."""
