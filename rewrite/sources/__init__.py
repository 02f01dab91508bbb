"""Where a model comes from: names, folders, pickles that are scanned and vetted, what is installed, example inputs."""
