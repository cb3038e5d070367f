"""Around bundles: the commands, measurements, the world of scenes and the training of its model, the check of a GPU."""
