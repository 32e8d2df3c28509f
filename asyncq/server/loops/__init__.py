"""The loops of a server, a file each; none knows another, they meet in what is in flight."""
