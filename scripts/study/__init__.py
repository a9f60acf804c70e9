"""The claims of reward-augmented DPO, tested in the sandbox: arms, worlds, measuring, tables."""
