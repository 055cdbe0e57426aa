"""The one trainer: recipes, schedules, the training loop, metrics and plots (report, sections 2.2 to 2.4)."""
