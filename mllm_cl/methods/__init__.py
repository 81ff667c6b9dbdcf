"""One file per method; the file name is the method's name."""
