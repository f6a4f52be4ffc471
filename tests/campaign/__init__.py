"""The robustness campaign: more of what the tests do, counted; see docs/robustness.md."""
