"""Reinforcement learning: objectives as pure functions of packed tokens, held to exact gradients by tests."""
