"""The task world: problem families with worked solutions, tools, and exact verifiers."""
