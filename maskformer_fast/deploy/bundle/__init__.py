"""Format of a bundle, without torch: the folder, its manifest and the recorded kernel launches."""
