"""The command line: reads arguments, sets logging up, shows results; works by the public names."""
