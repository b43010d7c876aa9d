"""The three stages: each module has one `train(config, …)`, a plain function."""
